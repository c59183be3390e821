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
# `linear` stores [out, in], `conv1d` (GPT-2's) [in, out]; a `table` is an embedding that does more
# than to look rows up; `leaf` is any other module without modules inside, `inner` a module with
# some, or a list of parameters.
Kind = Literal["linear", "conv1d", "embedding", "table", "leaf", "inner"]
_ASKED = "embed_positions"  # whose size Whisper asks for, which PEFT's embedding does not say


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
class Module:
    """A module of the model.

    Attributes:
        tensors: names of the parameters and stored buffers that it holds itself.
    """

    kind: Kind
    tensors: frozenset[str] = frozenset()


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
        self._modules = dict(self._net.named_modules(remove_duplicate=False))

    def parameters(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, ModuleParameter]:
        """The parameter or buffer of each stored tensor; none for what transformers converts.

        Args:
            stored: their shapes.
        """
        parameters = dict(self._net.named_parameters(remove_duplicate=False))
        buffers = {n: b for n, b in self._net.state_dict().items() if n not in parameters}
        result = {}
        for name, full_name in (by_name(stored, buffers) | by_name(stored, parameters)).items():
            module, _, parameter = full_name.rpartition(".")
            result[name] = ModuleParameter(module, parameter, _kind(self._modules[module], module))
        return result

    def modules(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Module]:
        """All modules of the model, by name.

        Args:
            stored: shapes of its tensors.
        """
        held: dict[str, list[str]] = {}
        for name in self._net.state_dict():
            module, _, tensor = name.rpartition(".")
            held.setdefault(module, []).append(tensor)
        return {
            name: Module(_kind(module, name), frozenset(held.get(name, ())))
            for name, module in self._modules.items()
            if name
        }

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
        seq2seq = name.endswith("ForConditionalGeneration") and self._net.config.is_encoder_decoder
        # PEFT gives such models tokens, which one that hears does not take.
        reads = self._net.main_input_name == "input_ids"
        return "SEQ_2_SEQ_LM" if seq2seq and reads else None


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


def _kind(module: Any, name: str) -> Kind:
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return "linear" if _is_linear(module) else "leaf"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, torch.nn.Embedding):
        plain = type(module).forward is torch.nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if plain and name.rpartition(".")[2] != _ASKED else "table"
    lists = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict)
    if isinstance(module, (*lists, torch.nn.ParameterList)):
        return "inner"
    return "leaf" if next(module.children(), None) is None else "inner"


def _is_linear(module: Any) -> bool:
    """Whether PEFT can add factors to what it computes: not to a router that returns the best."""
    import torch

    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # of torch's attention, which looks at the weight alone
    if type(module).forward is torch.nn.Linear.forward:
        return True
    try:
        result = module(torch.empty(1, module.in_features, device="meta"))
    except Exception:  # it is given more than its input, or another one
        return False
    return isinstance(result, torch.Tensor) and tuple(result.shape) == (1, module.out_features)
