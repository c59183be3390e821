"""Pairing a fine-tune's tensors with its base's, and the module that each belongs to.

The pairs are those of a merge of the fine-tune with its base. PEFT addresses modules as
transformers names them, and not every stored name is such a name: GPT-2's checkpoints leave out a
prefix that the model has. So the model is built without weights to look its modules up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from merge_cli.checkpoint.class_config import UnknownClass, empty_model
from merge_cli.engine.parameter_slices import by_name
from merge_cli.errors import MismatchError, Problem, SourceError, UsageError
from merge_cli.lora.expert_updates import ExpertPosition
from merge_cli.lora.experts import SEPARATE_NAMES
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.reference import local_folder, parse_reference
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.sources.source import Source

_RESIZED = (
    "Factors are of one shape: give both one vocabulary first, by a passthrough of the fine-tune "
    "with `base_model` and `tokenizer_source: base`, and extract from its result."
)
# `linear` stores [out, in], `conv1d` (GPT-2's) [in, out]; `leaf` is any other module without
# modules inside, `inner` a module with some.
Kind = Literal["linear", "conv1d", "embedding", "leaf", "inner"]


def plan_pair(model: str, base: str) -> Plan:
    """Pair the tensors of base and fine-tune, from headers.

    Raises:
        UsageError: the two are the same model.
        SourceError: a model that cannot be opened.
        MismatchError: they do not fit one another.
    """
    folder = Path.cwd()
    listed = (SourceSpec(parse_reference(model, folder), "models[0]"),)
    folders = [local_folder(name, folder) for name in (model, base)]
    if model == base or (folders[0] and folders[1] and folders[0].samefile(folders[1])):
        raise UsageError("model and base are the same", where=model)
    recipe = Recipe("task_arithmetic", parse_reference(base, folder), listed, folder=folder)
    try:
        return make_plan(recipe)
    except MismatchError as error:
        message = "the fine-tune does not fit the base"
        raise MismatchError(list(_without_recipe(error.problems)), message) from error


def _without_recipe(problems: Sequence[Problem]) -> Iterator[Problem]:
    """Replace hints about recipe keys: this command has no recipe."""
    for problem in problems:
        resized = "tokenizer_source" in problem.hint
        yield replace(problem, hint=_RESIZED) if resized else problem


@dataclass(frozen=True)
class ModuleParameter:
    """Where a tensor belongs: its module (`model.norm`), and its name there (`weight`)."""

    module: str
    name: str
    kind: Kind


@dataclass(frozen=True)
class ExpertMatrix:
    """An expert's matrix, and the stored tensors that make it.

    Attributes:
        tensors: names of stored tensors, whose rows follow one another.
        index: of the matrix in a stack; None where tensors are matrices themselves.
        transposed: whether it is stored as [inputs, outputs].
    """

    position: ExpertPosition
    tensors: tuple[str, ...]
    index: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        return f"{self.position.module}.{self.position.expert}.{self.position.parameter}"


class ModuleMap:
    """A model's modules without its weights.

    Args:
        source: the model; its config names the class.

    Raises:
        SourceError: transformers has no class for it.
    """

    def __init__(self, source: Source) -> None:
        self._label = source.label
        self._net = _build(source)
        self._modules = dict(self._net.named_modules())

    def parameters(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, ModuleParameter]:
        """The parameter of each stored tensor; none for tensors that transformers converts.

        Args:
            stored: their shapes.
        """
        parameters = dict(self._net.named_parameters(remove_duplicate=False))
        result = {}
        for name, full_name in by_name(stored, parameters).items():
            module, _, parameter = full_name.rpartition(".")
            result[name] = ModuleParameter(module, parameter, _kind(self._modules[module]))
        return result

    def experts(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[ExpertMatrix, ...]]:
        """Parameters that hold all experts of a layer, and the stored tensors that make them.

        Args:
            stored: their shapes.

        Returns:
            by the parameter's name, for each expert the tensors whose rows are its matrix.
        """
        matrices: dict[str, tuple[ExpertMatrix, ...]] = {}
        stored_names = by_name(stored, dict(self._net.named_parameters(remove_duplicate=False)))
        stacked = {full_name: name for name, full_name in stored_names.items()}
        for name, parameter in self._net.named_parameters(remove_duplicate=False):
            module, _, last = name.rpartition(".")
            if parameter.dim() != 3 or last not in SEPARATE_NAMES:
                continue
            transposed = bool(getattr(self._modules[module], "is_transposed", False))
            count, rows, columns = parameter.shape
            shape = (columns, rows) if transposed else (rows, columns)
            positions = [ExpertPosition(module, last, i, count, shape) for i in range(count)]
            if name in stacked:
                matrices[name] = tuple(
                    ExpertMatrix(p, (stacked[name],), p.expert, transposed) for p in positions
                )
                continue
            separate = _single(module, last, stored, count)
            stored_rows = sum(stored[tensor][0] for tensor in separate[0]) if separate else 0
            if separate and not transposed and stored_rows == rows:
                matrices[name] = tuple(
                    ExpertMatrix(position, names)
                    for position, names in zip(positions, separate, strict=True)
                )
        return matrices

    @property
    def task_type(self) -> str | None:
        """PEFT's word for the model's task; None leaves it open."""
        name = type(self._net).__name__
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "CAUSAL_LM"
        seq2seq = name.endswith("ForConditionalGeneration")
        return "SEQ_2_SEQ_LM" if seq2seq and self._net.config.is_encoder_decoder else None


def _single(
    module: str, parameter: str, stored: Mapping[str, tuple[int, ...]], count: int
) -> list[tuple[str, ...]]:
    """For each expert the tensors that are stored for it, in the order of their rows."""
    for inside in (module, module.replace(".mlp.", ".block_sparse_moe.")):
        for names in SEPARATE_NAMES[parameter]:
            experts = [tuple(f"{inside}.{i}.{name}.weight" for name in names) for i in range(count)]
            if all(name in stored for expert in experts for name in expert):
                return experts
    return []


def _build(source: Source) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as SPEAKING

    config = dict(source.config)
    kind = config.get("model_type")
    if not config.get("architectures") and isinstance(kind, str) and kind in SPEAKING:
        config["architectures"] = [SPEAKING[kind]]
    try:
        return empty_model(config)
    except UnknownClass as error:
        message = f"transformers cannot build its modules: {error}"
        hint = "PEFT loads adapters of models that transformers has a class for."
        raise SourceError(message, model=source.label, hint=hint) from error


def _kind(module: Any) -> Kind:
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "inner" if next(module.children(), None) is not None else "leaf"
