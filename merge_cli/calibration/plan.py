"""What has to be gathered, on what, where and with how much: known without loading weights.

One source's part of what is gathered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.calibration.data import (
    Examples,
    linear_layers,
    load_examples,
    shown,
    stored_parameters,
)
from merge_cli.calibration.store import find, statistics_path
from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.statistics import CalibrationStatistics, StatisticsFile
from merge_cli.engine.device import choose_device
from merge_cli.errors import SourceError
from merge_cli.evaluation.empty import empty_model
from merge_cli.evaluation.fingerprints import remembered_identity
from merge_cli.evaluation.live import choose_dtype, context_of
from merge_cli.evaluation.tokenizers import one_tokenizer
from merge_cli.planning.plan import Plan
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.statistics import ORIGIN, Statistics
from merge_cli.sources.source import Source


@dataclass(frozen=True)
class CalibrationPlan:
    """A gathering, decided.

    Attributes:
        parts: one for each source, in the recipe's order.
        device, dtype: as words for torch; `why` has the reasons, by option.
        tensors: merged tensors that get statistics, as far as an empty model tells.
        bytes: of statistics on disk, at most, for each source.
        memory: bytes of a model and its sums, if they are made in one round; without activations.
    """

    plan: Plan
    kind: str
    statistics: Statistics
    parts: tuple[SourcePart, ...]
    device: str
    dtype: str
    why: dict[str, str]
    tensors: int
    bytes: tuple[int, ...]
    memory: int

    @property
    def missing(self) -> tuple[SourcePart, ...]:
        """What the cache does not have."""
        return tuple(part for part in self.parts if part.cached is None)

    @property
    def means(self) -> int:
        """Merged tensors that get the plain mean, as far as an empty model tells."""
        return sum(task.action == "merge" for task in self.plan.tasks) - self.tensors

    @property
    def bytes_to_gather(self) -> int:
        """Bytes that the cache will grow by, at most."""
        pairs = zip(self.parts, self.bytes, strict=True)
        return sum(size for part, size in pairs if part.cached is None)

    @property
    def calibrated(self) -> CalibrationStatistics | None:
        """The statistics, if the cache has them all."""
        files = tuple(part.cached for part in self.parts if part.cached is not None)
        return CalibrationStatistics(files) if len(files) == len(self.parts) else None


def plan_calibration(
    plan: Plan,
    device: str = "auto",
    identify: Callable[[Source], str | None] = remembered_identity,
    examples: Sequence[Examples] | None = None,
) -> CalibrationPlan:
    """Decide from headers, configs, tokenizers and data.

    Args:
        identify: what is known of a source's content. By default what needs no weights to be
            read: of a model that was not run here yet there is nothing in the cache.
        examples: of each source, in the recipe's order; default those of its `data:`.

    Raises:
        SourceError: data or a model that cannot be used, an adapter, other data than a resolved
            recipe was made with, nothing to gather.
        MismatchError: sources that do not share a tokenizer.
        RecipeError: a recipe that changes the vocabulary.
        ResourceError: a device or a package is missing.
    """
    statistics, kind = plan.recipe.statistics or Statistics(), plan.method.gathers
    plan.aligned.refuse_rearranged(plan.recipe, plan.recipe.merge_method)
    tokenizer, template_why = one_tokenizer(plan)
    net = empty_model(plan)
    chosen = choose_device(device, planned=True)
    where = f"cuda:{chosen.indexes[0]}" if chosen.indexes else "cpu"
    dtype, dtype_why = choose_dtype(plan.sources[plan.config_index], chosen.kind, statistics.dtype)
    context = context_of(net.config, statistics.max_length)
    labels = [source.label for source in plan.sources]
    parts = []
    for number, spec in enumerate(plan.recipe.models):
        assert spec.data is not None, "check_recipe refuses a source without data"
        source = plan.sources[labels.index(str(spec.model))]
        looked_at = (
            examples[number]
            if examples is not None
            else load_examples(
                plan.recipe,
                spec.data,
                tokenizer,
                statistics,
                context,
                net.get_input_embeddings().weight.shape[0],
            )
        )
        part = SourcePart(
            source,
            shown(spec.data),
            looked_at,
            identify(source),
            kind,
            statistics,
            plan.recipe.seed,
            where,
            dtype,
        )
        parts.append(part if part.identity is None else replace(part, cached=find(part.path)))
    _verify(plan.recipe, parts)
    expected = [_expected(kind, net, part.source) for part in parts]
    tensors = _merged_with(plan, expected)
    if not tensors:
        kinds = "linear layer" if kind == "gram" else "parameter"
        message = (
            f"no stored tensor is a {kinds} as transformers loads the models: all would be means"
        )
        raise SourceError(
            message, model=plan.sources[plan.config_index].label, hint="Use `soup` instead."
        )
    weights = sum(p.numel() for p in net.parameters())
    # What is on disk are the same sums: float32 in memory, too, or float64 and rounded at the end.
    sums = (1 if kind == "fisher" else 2) * max(size for size, _ in expected)
    why = {"device": f"{chosen.name}: {chosen.reason}", "dtype": dtype_why}
    return CalibrationPlan(
        plan,
        kind,
        statistics,
        tuple(parts),
        where,
        dtype,
        {**why, **({"chat template": template_why} if template_why else {})},
        tensors,
        tuple(
            part.cached.size if part.cached is not None else size
            for part, (size, _) in zip(parts, expected, strict=True)
        ),
        weights * width_of(dtype) + sums,
    )


def _verify(recipe: Recipe, parts: Sequence[SourcePart]) -> None:
    """A resolved recipe records its examples, as it does its models: others give other bytes.

    Raises:
        SourceError: data that has changed since.
    """
    recorded = recipe.metadata.get(ORIGIN)
    if not recipe.inputs or not isinstance(recorded, list):
        return
    for part, item in zip(parts, recorded, strict=False):
        if (
            isinstance(item, Mapping)
            and item.get("data", part.examples.digest) != part.examples.digest
        ):
            message = "does not give the examples that this recipe was resolved with"
            hint = "Restore data and settings, or remove `inputs` from the recipe."
            raise SourceError(message, file=part.data, hint=hint)


def _expected(kind: str, net: Any, source: Source) -> tuple[int, set[str]]:
    """Bytes of statistics at most (what layers share is found by running), and of which tensors."""
    if kind == "fisher":
        stored = stored_parameters(net, source)
        return sum(4 * source.tensors[name].size for name in stored), stored
    layers = linear_layers(net, source)
    return sum(4 * layer.width**2 for layer in layers), {layer.stored for layer in layers}


def _merged_with(plan: Plan, expected: list[tuple[int, set[str]]]) -> int:
    """Output tensors that every source has statistics of."""
    return sum(
        all(
            ref.name in expected[index][1]
            for index, ref in zip(task.ids, task.operands, strict=True)
        )
        for task in plan.tasks
        if task.action == "merge"
    )


_FORMAT = 1
OnTokens = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True)
class SourcePart:
    """What has to be known of one source.

    Attributes:
        data: files or data set, as the recipe names them.
        identity: of the model's files; None where nobody has read them yet.
        seed: the recipe's.
        device, dtype: what the model runs on and in.
        cached: what the cache has.
        about: what the file will say of itself, as far as it is known.
    """

    source: Source
    data: str
    examples: Examples
    identity: str | None
    kind: str
    statistics: Statistics
    seed: int
    device: str
    dtype: str
    cached: StatisticsFile | None = None
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def path(self) -> Path:
        """The file, named by everything that decides its content."""
        assert self.identity is not None, "who gathers knows what from"
        options = self.statistics
        drawn = options.targets == "sampled"
        settings = (
            (options.batch_tokens,)
            if self.kind == "gram"
            else (options.targets, self.seed if drawn else None)
        )
        # Other devices and versions round otherwise.
        how = [self.device.partition(":")[0], self.dtype, version("torch"), version("transformers")]
        key = json.dumps([_FORMAT, self.kind, self.identity, self.examples.digest, settings, how])
        return statistics_path(hashlib.sha256(key.encode()).hexdigest())
