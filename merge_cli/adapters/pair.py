"""A fine-tune and its base side by side, tensor by tensor, as a merge would see them.

Which module of the model each stored tensor belongs to, and of what kind that module is.

PEFT addresses modules as transformers names them, and not every stored name is one: GPT-2's
checkpoints leave out a prefix that the model has. So the model is built without weights and asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from merge_cli.checkpoint.class_config import UnknownClass, empty_model
from merge_cli.engine.parameter_slices import by_name
from merge_cli.errors import MismatchError, Problem, SourceError, UsageError
from merge_cli.lora.experts import SINGLE, ExpertPosition
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.reference import local_folder, parse_reference
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.sources.source import Source


def plan_pair(model: str, base: str) -> Plan:
    """The base's tensors and the fine-tune's, from headers.

    Raises:
        UsageError: the two are one.
        SourceError: one that cannot be opened.
        MismatchError: they do not fit one another.
    """
    here = Path.cwd()
    listed = (SourceSpec(parse_reference(model, here), "models[0]"),)
    places = [local_folder(name, here) for name in (model, base)]
    if model == base or (places[0] and places[1] and places[0].samefile(places[1])):
        raise UsageError("model and base are the same", where=model)
    recipe = Recipe("task_arithmetic", parse_reference(base, here), listed, folder=here)
    try:
        return make_plan(recipe)
    except MismatchError as error:
        message = "the fine-tune does not fit the base"
        raise MismatchError(list(_without_recipe(error.problems)), message) from error


def _without_recipe(problems: Sequence[Problem]) -> Iterator[Problem]:
    """Keys of recipes are no help here: there is none that they could be written in."""
    for problem in problems:
        resized = "tokenizer_source" in problem.hint
        yield replace(problem, hint=_RESIZED) if resized else problem


_RESIZED = (
    "Factors are of one shape: give both one vocabulary first, by a passthrough of the fine-tune "
    "with `base_model` and `tokenizer_source: base`, and extract from its result."
)


# `linear` stores [out, in], `conv1d` (GPT-2's) [in, out]; `embedding` looks rows up; `leaf` is any
# other module that has no modules inside, `inner` one that has.
Kind = Literal["linear", "conv1d", "embedding", "leaf", "inner"]


@dataclass(frozen=True)
class ModuleParameter:
    """Where a tensor belongs: `model.norm`, `weight`."""

    module: str
    parameter: str
    kind: Kind


@dataclass(frozen=True)
class AdapterPart:
    """An expert's matrix, and what it is made of.

    Attributes:
        tensors: names of stored tensors, whose rows follow one another.
        index: of the matrix in a stack; None where tensors are matrices themselves.
        turned: whether it is stored as [inputs, outputs].
    """

    place: ExpertPosition
    tensors: tuple[str, ...]
    index: int | None = None
    turned: bool = False

    @property
    def name(self) -> str:
        return f"{self.place.module}.{self.place.expert}.{self.place.parameter}"


class ModuleMap:
    """A model's modules without its weights.

    Args:
        source: the model; its config decides.

    Raises:
        SourceError: transformers has no class for it.
    """

    def __init__(self, source: Source) -> None:
        self._label = source.label
        self._net = _build(source)
        self._modules = dict(self._net.named_modules())

    def seats(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, ModuleParameter]:
        """Of stored tensors, by name; without those that transformers holds in another form.

        Args:
            stored: their shapes.
        """
        parameters = dict(self._net.named_parameters(remove_duplicate=False))
        result = {}
        for name, own in by_name(stored, parameters).items():
            module, _, parameter = own.rpartition(".")
            result[name] = ModuleParameter(module, parameter, _kind(self._modules[module]))
        return result

    def experts(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[AdapterPart, ...]]:
        """Parameters that hold all experts of a layer, and the stored tensors that make them.

        Args:
            stored: their shapes.

        Returns:
            by the parameter's name, for each expert the tensors whose rows are its matrix.
        """
        result: dict[str, tuple[AdapterPart, ...]] = {}
        known = by_name(stored, dict(self._net.named_parameters(remove_duplicate=False)))
        together = {own: name for name, own in known.items()}
        for name, parameter in self._net.named_parameters(remove_duplicate=False):
            module, _, last = name.rpartition(".")
            if parameter.dim() != 3 or last not in SINGLE:
                continue
            turned = bool(getattr(self._modules[module], "is_transposed", False))
            count, rows, columns = parameter.shape
            shape = (columns, rows) if turned else (rows, columns)
            places = [ExpertPosition(module, last, i, count, shape) for i in range(count)]
            if name in together:
                result[name] = tuple(
                    AdapterPart(p, (together[name],), p.expert, turned) for p in places
                )
                continue
            single = _single(module, last, stored, count)
            heights = sum(stored[item][0] for item in single[0]) if single else 0
            if single and not turned and heights == rows:
                result[name] = tuple(
                    AdapterPart(place, names) for place, names in zip(places, single, strict=True)
                )
        return result

    @property
    def task_type(self) -> str | None:
        """PEFT's word for what the model does; None leaves it open."""
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
        for names in SINGLE[parameter]:
            result = [tuple(f"{inside}.{i}.{name}.weight" for name in names) for i in range(count)]
            if all(name in stored for item in result for name in item):
                return result
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
        message = f"transformers cannot tell what its modules are: {error}"
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
