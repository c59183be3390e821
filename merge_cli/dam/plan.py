"""What would be trained, on what, where and with how much: known without loading weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.dam.data import Dataset, load_datasets, steps_of, used
from merge_cli.dam.distributed import World
from merge_cli.dam.memory import MemoryNeeds, Peak, memory_needs, peak_of
from merge_cli.dam.models import TargetParameter, find_targets, stored_tensors, weight_bytes
from merge_cli.dam.sources import Stored
from merge_cli.dam.static import StaticMerge, plan_static_merges, start_at
from merge_cli.engine.device import Device, choose_device, free_memory
from merge_cli.engine.residency import SourceResidency, choose_residency, reserve
from merge_cli.errors import MismatchError, ResourceError
from merge_cli.evaluation.empty import empty_model
from merge_cli.evaluation.fingerprints import remembered_identity
from merge_cli.evaluation.live import choose_dtype, context_of
from merge_cli.evaluation.teachers import KeptPredictions, Teacher
from merge_cli.evaluation.tokenizers import one_tokenizer
from merge_cli.planning.plan import Plan
from merge_cli.recipe.training import Training
from merge_cli.sources.source import Source
from merge_cli.system.machine import show_size


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher's part.

    Attributes:
        tokens: whose predictions are kept, of train and held-out data.
        missing: sequences that are not in the cache yet; all, where its weights were not read yet.
        bytes: what the predictions take on disk; in memory where they are of the whole vocabulary.
        held: what those of held-out data take in memory.
    """

    dataset: str
    tokens: int
    missing: int
    bytes: int
    held: int


@dataclass(frozen=True)
class TrainingPlan:
    """A training, decided.

    Attributes:
        device, dtype: as words for torch; `why` has the reasons, by option.
        mode: fused or two_pass.
        labels: of the operands.
        needs: the memory that training takes, without the sources.
        peak: with them, where they are kept.
        warnings: what will most likely not fit.
        context: tokens that the models take, at most `max_length`.
        static: whole merges that it may start from.
    """

    plan: Plan
    training: Training
    targets: tuple[TargetParameter, ...]
    datasets: tuple[Dataset, ...]
    steps: int
    device: str
    dtype: str
    residency: SourceResidency
    mode: str
    teachers: tuple[TeacherPlan, ...]
    labels: tuple[str, ...]
    why: dict[str, str]
    needs: MemoryNeeds
    peak: Peak
    warnings: tuple[str, ...] = ()
    context: int = 0
    static: tuple[StaticMerge, ...] = ()

    @property
    def coefficients(self) -> int:
        """Numbers that are learned, unless training starts at a whole merge."""
        return sum(target.count for target in self.targets)

    @property
    def coefficients_from_whole(self) -> int | None:
        """Numbers that are learned from a whole merge, which changes the base and has it among its
        sources; None where training cannot start at one."""
        if not self.static or self.plan.base is None:
            return None
        sources = len(self.labels)
        return sum(target.count // sources * (sources + 1) for target in self.targets)

    @property
    def student_bytes(self) -> int:
        """Of its weights."""
        return self.needs.student

    @property
    def tokens(self) -> int:
        """Tokens of all steps together, about; those of a data set that begins again, again."""
        return sum(
            round(
                sum(len(example.ids) for example in data.train)
                / len(data.train)
                * min(self.training.batch_size, len(data.train))
                * self.steps
            )
            for data in self.datasets
        )

    @property
    def has_test(self) -> bool:
        """Whether rows of every data set are left to judge by."""
        return all(dataset.test for dataset in self.datasets)

    @property
    def kept(self) -> KeptPredictions:
        """How predictions are kept for training."""
        return kept_for(self.training, held_out=False)


def kept_for(training: Training, *, held_out: bool) -> KeptPredictions:
    """Held-out predictions are kept at temperature 1: what is reported is a plain divergence."""
    k = None if training.top_k == "full" else int(training.top_k)
    temperature = 1.0 if held_out else training.temperature
    return KeptPredictions(k, temperature, training.cache_dtype)


def plan_training(plan: Plan, device: str = "auto", world: World | None = None) -> TrainingPlan:
    """Decide a training from headers, configs, tokenizers and data.

    Raises:
        SourceError: data or a model that cannot be used.
        MismatchError: sources that do not share a tokenizer, parameters that nothing is stored for.
        ResourceError: a device or a package is missing, or the recipe's residency does not fit.
    """
    world = world or World()
    training = plan.recipe.learning
    if training.tensorboard and find_spec("tensorboard") is None:
        hint = "pip install tensorboard, or leave `tensorboard` out."
        raise ResourceError("the package tensorboard is missing", hint=hint)
    plan.aligned.refuse_rearranged(plan.recipe, "learning")
    operands = [plan.sources[i] for i in plan.operands]
    labels = tuple(source.label for source in operands)
    tokenizer, template_why = one_tokenizer(plan)
    net = empty_model(plan)
    targets, problems = find_targets(plan, net, training)
    if problems:
        raise MismatchError(problems, "the student cannot be made of what is stored")
    if not any(target.trained for target in targets):
        message = f"chooses no tensor: {', '.join(training.train)}"
        raise MismatchError([plan.recipe.problem("training.train", message)])
    context = context_of(net.config, training.max_length)
    datasets = load_datasets(
        plan.recipe,
        labels,
        tokenizer,
        training,
        context,
        net.get_input_embeddings().weight.shape[0],
    )
    steps = steps_of(datasets, training)
    static, left_out = plan_static_merges(plan, datasets, context_of(net.config, None), device)
    datasets = used(datasets, steps, training)
    chosen = choose_device(device, planned=True)
    index = chosen.indexes[world.local % len(chosen.indexes)] if chosen.indexes else None
    where = "cpu" if index is None else f"cuda:{index}"
    dtype, dtype_why = choose_dtype(plan.sources[plan.config_index], chosen.kind, training.dtype)
    teachers = tuple(_teachers(operands, datasets, training, where, dtype, net))
    with_base = training.form == "task_vector" or bool(static)
    needs = memory_needs(
        net,
        targets,
        datasets,
        training,
        sources=len(operands) + with_base + bool(static and plan.base is not None),
        dtype=dtype,
        predictions=sum(teacher.held for teacher in teachers),
        on_cpu=index is None,
    )
    residency = choose_residency(
        weight_bytes(
            _with_whole(stored_tensors(plan, targets)) if static else stored_tensors(plan, targets),
            with_base=with_base,
            on_cpu=index is None,
        ),
        index,
        shared_with="student",
        on_device=needs.beside_sources,
        on_host=needs.on_host + (needs.beside_sources if index is None else 0),
        requested=training.residency,
        memory=chosen.memory,
        exact=True,
    )
    peak = peak_of(needs, residency.bytes, residency.residency, on_cpu=index is None)
    mode, mode_why = _mode(training, dtype, world)
    return TrainingPlan(
        plan,
        training,
        tuple(targets),
        tuple(datasets),
        steps,
        where,
        dtype,
        residency,
        mode,
        teachers,
        labels,
        {
            "device": f"{chosen.name}: {chosen.reason}",
            "dtype": dtype_why,
            "mode": mode_why,
            "residency": residency.reason,
            **({"chat template": template_why} if template_why else {}),
            **({"start": "; ".join(left_out)} if left_out else {}),
        },
        needs,
        peak,
        tuple(_too_large(chosen, index, needs, peak)),
        context,
        static,
    )


def started_at(decided: TrainingPlan, folder: Path) -> TrainingPlan:
    """The same training, of changes from the whole merge in a folder."""
    plan = start_at(decided.plan, folder)
    training = plan.recipe.learning
    targets, problems = find_targets(plan, empty_model(plan), training)
    assert not problems, "the merge has the tensors of its sources"
    labels = tuple(plan.sources[i].label for i in plan.operands)
    return replace(decided, plan=plan, training=training, targets=tuple(targets), labels=labels)


def _with_whole(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """As with a whole merge for the base, as large as a source, and the base among the sources."""
    return {
        name: replace(
            item,
            sources=item.sources if item.base is None else (*item.sources, item.base),
            base=item.base or item.sources[0],
        )
        for name, item in stored.items()
    }


def _too_large(device: Device, index: int | None, needs: MemoryNeeds, peak: Peak) -> Iterator[str]:
    """What is likely not to fit.

    Raises:
        ResourceError: predictions that stay in memory are alone larger than what is free there.
    """
    host = free_memory("cpu", ())
    if needs.predictions > host and device.memory is None:
        message = f"the teachers' predictions take {show_size(needs.predictions)} in memory, "
        message += f"and {show_size(host)} are free"
        hint = "Use `top_k: 64`, which keeps them on disk, or fewer `examples`."
        raise ResourceError(message, hint=hint)
    hint = "checkpointing: true, a smaller batch_tokens or dtype: bfloat16 need less"
    if peak.device is not None and index is not None:
        free = device.memory or free_memory("cuda", (index,))
        if peak.device > free - reserve(free):
            yield (
                f"training takes about {show_size(peak.device)} of device memory, and "
                f"{show_size(free)} are free, {show_size(reserve(free))} of them in reserve: {hint}"
            )
    if device.memory is None and peak.host > host:
        needed, free_words = show_size(peak.host), show_size(host)
        yield f"training takes about {needed} of memory, and {free_words} are free: {hint}"


def _mode(training: Training, dtype: str, world: World) -> tuple[str, str]:
    for holds, why in (
        (world.size > 1, "gradients are added up over processes first"),
        (training.clip_norm is not None, "gradients are clipped together"),
        (dtype == "float16", "float16 gradients can overflow"),
    ):
        if holds:
            return "two_pass", why
    if training.mode != "auto":
        return training.mode, "asked for"
    return "fused", "one read of the sources in a step's last backward pass"


def _teachers(
    operands: Sequence[Source],
    datasets: Sequence[Dataset],
    training: Training,
    device: str,
    dtype: str,
    net: Any,
) -> Iterator[TeacherPlan]:
    vocabulary = net.get_output_embeddings().weight.shape[0]
    for dataset in datasets:
        source = operands[dataset.source]
        identity = remembered_identity(source)
        teacher = None if identity is None else Teacher(source, identity, device, dtype)
        parts = [
            (rows, kept_for(training, held_out=True)) for rows in (dataset.held_out, dataset.test)
        ]
        if training.needs_teachers:
            parts.append((dataset.train, kept_for(training, held_out=False)))
        tokens = [sum(item.counted for item in part) for part, _ in parts]
        stored = sum(
            kept.bytes_of(count, vocabulary) for count, (_, kept) in zip(tokens, parts, strict=True)
        )
        # Held-out batches are made once and stay, their ids as torch indexes with them.
        k = vocabulary if training.top_k == "full" else min(int(training.top_k), vocabulary)
        batches = sum(tokens[:2]) * (k * (8 + width_of(training.cache_dtype)) + 4)
        yield TeacherPlan(
            dataset.name,
            sum(tokens),
            sum(teacher.missing(part, kept) if teacher else len(part) for part, kept in parts),
            stored,
            batches + (stored if training.top_k == "full" else 0),
        )
