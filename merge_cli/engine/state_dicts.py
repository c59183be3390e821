"""Merge dicts of tensors in memory: what training loops and notebooks call.

The methods are the registry's, and they see what the engine shows them of files: flat, upcast
blocks, with task vectors subtracted once. So the numbers are those of a merge of the same weights
on disk, bit for bit. Everything runs in the calling thread, on the device where the tensors are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from merge_cli.checkpoint.dtypes import MERGEABLE, SAFETENSORS_NAMES, promoted, torch_dtype
from merge_cli.checkpoint.layout import natural_key
from merge_cli.checkpoint.statistics import TensorStatistics
from merge_cli.engine.operands import ModelReader, operands_of, sample_ranges
from merge_cli.engine.worker_context import all_finite
from merge_cli.errors import MismatchError, NonFiniteError, Problem, RecipeError, UsageError
from merge_cli.kernels.convert import encode
from merge_cli.kernels.reduce import BLOCK_MULTIPLE
from merge_cli.methods.blocks import Block, Span, operand_specs
from merge_cli.methods.registry import Method, get_method
from merge_cli.planning.resolve import Resolver, arguments, check_recipe
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Parameters, Recipe, SourceSpec
from merge_cli.recipe.values import Parameter, Scalar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
StateDict = Mapping[str, "torch.Tensor"]
_BASE = ModelRef("base")
_CPU_BLOCK, _DEVICE_BLOCK = 4 * BLOCK_MULTIPLE, 64 * BLOCK_MULTIPLE
_LISTED = 8  # problems of one kind in a message


def merge_state_dicts(
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    method: str = "soup",
    base: StateDict | None = None,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    allow_non_finite: bool = False,
    **parameters: Scalar | Sequence[Scalar],
) -> dict[str, torch.Tensor]:
    """Merge state dicts, by any method that needs nothing but weights and parameters.

    Args:
        state_dicts: name -> tensor, with the same names and shapes in each. What is not a float
            (counters, masks) is copied from the base, or else from the first.
        weights: one for each state dict; None leaves them to the method.
        method: as recipes name it (`merge-cli methods`).
        base: the model that task vectors are measured from, for methods that have them.
        dtype: of the result's floats; None keeps each tensor's own, where dicts differ the
            narrowest that holds the numbers of all.
        seed: of random masks.
        allow_non_finite: merge NaN and Inf, too.
        parameters: the method's, by the recipe's names (`lambda_` for `lambda`): one value, or a
            list with one for each state dict where the method takes one for each model.

    Returns:
        new tensors of the same shapes, each on the device of the base's tensor, or else the
        first's. Tensors that share memory in every dict (tied weights) share it in the result.

    Raises:
        UsageError: a method that needs more, a base that is missing or has no use, parameters that
            the method does not have.
        RecipeError: values that cannot be, or more or fewer state dicts than the method takes.
        MismatchError: names, shapes or kinds of tensors that differ, all at once.
        NonFiniteError: NaN or Inf among the weights, or a result too large for float16.
    """
    import torch

    recipe = _recipe(len(state_dicts), weights, method, base is not None, seed, parameters)
    formula = _method_of(recipe)
    specs = operand_specs(recipe, formula, recipe.models)
    if base is not None and not (formula.needs_base or _BASE in [spec.model for spec in specs]):
        raise UsageError(f"{method} has no use for a base", hint="Leave base out.")
    labels = [str(spec.model) for spec in recipe.models]
    given = dict(zip(labels, state_dicts, strict=True))
    given |= {str(_BASE): base} if base is not None else {}
    check_tensors(given, reference=str(_BASE) if base is not None else str(specs[0].model))
    indexes = {spec.model: index for index, spec in enumerate(recipe.models)}
    merger = _Merger(
        formula,
        Resolver(recipe, formula, None, specs),
        [given[str(spec.model)] for spec in specs],
        base if formula.needs_base else None,
        Span(seed=seed, sources=tuple(indexes.get(spec.model, -1) for spec in specs)),
        SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")] if dtype is not None else None,
        allow_non_finite,
    )
    with torch.no_grad():
        return merger.merge(base if base is not None else state_dicts[0], list(given.values()))


def _recipe(
    count: int,
    weights: Sequence[float] | None,
    method: str,
    has_base: bool,
    seed: int,
    parameters: Mapping[str, Scalar | Sequence[Scalar]],
) -> Recipe:
    """The recipe that means this merge, so that it is checked as every other is.

    Raises:
        UsageError, RecipeError: as `merge_state_dicts` does.
    """
    if not count:
        raise UsageError("there are no state dicts to merge")
    values = {name.rstrip("_"): value for name, value in parameters.items()}
    if weights is not None:
        if "weight" in values:
            raise UsageError("give either weights or weight, not both")
        values["weight"] = [*weights]
    shared: dict[str, Parameter] = {}
    of_models: list[dict[str, Parameter]] = [{} for _ in range(count)]
    for name, value in values.items():
        if isinstance(value, str) or not isinstance(value, Sequence):
            shared[name] = Parameter(name, value, name)
        elif len(value) != count:
            raise UsageError(f"{name} has {len(value)} values for {count} state dicts")
        else:
            for parameters_of, item in zip(of_models, value, strict=True):
                parameters_of[name] = Parameter(name, item, name)
    models = tuple(_spec(index, settings) for index, settings in enumerate(of_models))
    base = _BASE if has_base else None
    return Recipe(method, base, models, parameters=shared, seed=seed)


def _spec(index: int, parameters: Parameters) -> SourceSpec:
    return SourceSpec(ModelRef(f"state_dicts[{index}]"), f"models[{index}]", parameters)


def _method_of(recipe: Recipe) -> Method:
    """The formula that is computed.

    Raises:
        UsageError: one that needs more than weights, or a base that is not there.
        RecipeError: what is wrong with the parameters.
    """
    name = recipe.merge_method
    method = get_method(name)
    if not method.plain:
        hint = "Merge checkpoints on disk by a recipe, or take soup with weights."
        raise UsageError(f"{name} needs more than weights and parameters", hint=hint)
    method = (method.resolve_variant and method.resolve_variant(recipe)) or method
    if method.needs_base and recipe.base_model is None:
        raise UsageError(f"{name} needs the model that the others began from", hint="Give base.")
    # In a recipe, those of mergekit's other methods are passed by; here nobody has copied them.
    per_model = [*recipe.models[0].parameters]
    for given in (*recipe.parameters, *per_model):
        parameter = method.parameters.get(given)
        if parameter is None:
            hint = f"Its parameters: {', '.join(method.parameters) or 'none'}."
            raise UsageError(f"{name} has no parameter '{given}'", hint=hint)
        if given in per_model and not parameter.per_model:
            raise UsageError(f"{given} is one value for the whole merge, not one for each model")
    problems = check_recipe(recipe).problems
    if problems:
        raise RecipeError(problems)
    return method


def check_tensors(given: Mapping[str, StateDict], reference: str) -> None:
    """Whether state dicts can be merged with one another.

    Args:
        given: by what messages call each.
        reference: which of them the others must be like.

    Raises:
        MismatchError: every name, shape and kind of tensor that cannot be merged.
    """
    problems: list[Problem] = []
    expected = given[reference]
    for label, tensors in given.items():
        lacking = [name for name in expected if name not in tensors]
        extra = [name for name in tensors if name not in expected]
        for names, relation in ((lacking, "lacks"), (extra, f"is not in {reference}:")):
            if names:
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                listed = ", ".join(names[:_LISTED])
                problems.append(Problem(f"{relation} {listed}{more}", label))
        for name, tensor in tensors.items():
            wrong = _unfit(tensor)
            if not wrong and name in expected and not _unfit(expected[name]):
                shape, other = tuple(tensor.shape), tuple(expected[name].shape)
                if shape != other:
                    wrong = f"has the shape {shape}, and {other} in {reference}"
            if wrong:
                problems.append(Problem(wrong, f"{label}[{name!r}]"))
    if problems:
        raise MismatchError(problems, "the state dicts cannot be merged")


def _unfit(tensor: Any) -> str:
    """Why this is no tensor that can be merged or copied; empty where it is one."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return f"is not a tensor but {type(tensor).__name__}"
    if hasattr(tensor, "full_tensor"):
        return "is spread over processes: gather it first (full_tensor())"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "is sparse or quantised"
    if tensor.is_meta:
        return "has no numbers (it is on the meta device)"
    if (tensor.is_floating_point() and dtype_name(tensor) not in MERGEABLE) or tensor.is_complex():
        return f"is {str(tensor.dtype).removeprefix('torch.')}, which is not merged"
    return ""


def dtype_name(tensor: torch.Tensor) -> str:
    """safetensors' name of a tensor's dtype; empty where no recipe may name it."""
    return SAFETENSORS_NAMES.get(str(tensor.dtype).removeprefix("torch."), "")


@dataclass(frozen=True)
class _Merger:
    """One method over dicts that fit one another.

    Attributes:
        operands: the dicts in the formula's order.
        base: where the formula has one.
        at: seed and places of the operands, for random masks.
        dtype: safetensors' name of the result's; None keeps each tensor's own.
    """

    method: Method
    resolver: Resolver
    operands: Sequence[StateDict]
    base: StateDict | None
    at: Span
    dtype: str | None
    allow_non_finite: bool

    def merge(self, reference: StateDict, given: Sequence[StateDict]) -> dict[str, torch.Tensor]:
        """Every tensor of the reference, in its order."""
        result: dict[str, torch.Tensor] = {}
        first: dict[object, str] = {}
        readers: list[_TensorReader] = []
        for name, tensor in reference.items():
            original = first.setdefault(same_memory(name, given), name)
            if original == name and self._merged(name) and tensor.numel():
                readers.append(self._reader(name))
        prepared = None
        if self.method.model_pass is not None and readers:
            # In the order of a plan: of equal magnitudes, the first one is kept.
            readers.sort(key=lambda reader: natural_key(reader.name))
            prepared = self.method.model_pass(ModelReader(readers, _in_order, lambda: None))
        merged = {reader.name: reader for reader in readers}
        for name, tensor in reference.items():
            original = first[same_memory(name, given)]
            if original != name:
                result[name] = result[original]
            elif name in merged:
                result[name] = self._tensor(merged[name], prepared)
            else:
                kind = torch_dtype(self.dtype) if self.dtype and self._merged(name) else None
                result[name] = tensor.detach().to(kind or tensor.dtype, copy=True)
        return result

    def _merged(self, name: str) -> bool:
        inputs = [*self.operands, self.base] if self.base is not None else self.operands
        return all(dtype_name(tensors[name]) in MERGEABLE for tensors in inputs)

    def _reader(self, name: str) -> _TensorReader:
        resolved = self.resolver.of(name, 0.0)
        if resolved.error:
            raise UsageError(resolved.error)
        base = self.base[name] if self.base is not None else None
        return _TensorReader(
            name,
            [tensors[name] for tensors in self.operands],
            base,
            resolved.parameters,
            self.at,
            deltas="deltas" in self.method.supplied,
        )

    def _tensor(self, reader: _TensorReader, model_pass: Any) -> torch.Tensor:
        import torch

        kinds = {dtype_name(tensor) for tensor in reader.inputs}
        dtype = self.dtype or (promoted(kinds) if len(kinds) > 1 else kinds.pop())
        out = torch.empty(reader.size, dtype=torch_dtype(dtype), device=reader.device)
        supplied = arguments(self.method, reader.parameters)
        if self.method.tensor_pass is not None:
            supplied["prepared"] = self.method.tensor_pass(reader, model_pass, **reader.parameters)
        supplied = {
            name: value
            for name, value in supplied.items()
            if name != "prepared" or name in self.method.supplied
        }
        for block in reader.blocks():
            if not (block.finite or self.allow_non_finite):
                message = "NaN or Inf among the weights"
                raise NonFiniteError(message, tensor=reader.name, hint="Or allow_non_finite=True.")
            values = self.method.function(**operands_of(block, self.method.supplied), **supplied)
            rounded, fits = encode(values, dtype)
            if not fits and block.finite and not self.allow_non_finite:
                message = "some merged weights are too large for float16"
                raise NonFiniteError(message, tensor=reader.name, hint="Give another dtype.")
            out[block.at.start : block.at.start + len(rounded)] = rounded
        return out.view(reader.shape)


def _in_order(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [work(item) for item in items]


def same_memory(name: str, given: Sequence[StateDict]) -> object:
    """Equal for two names whose tensors are the same memory in every dict."""
    tensors = [tensors[name] for tensors in given]
    if not all(tensor.numel() for tensor in tensors):
        return name
    return tuple((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)


class _TensorReader:
    """One tensor of every dict as `methods.blocks.TensorBlocks`."""

    statistics: TensorStatistics | None = None

    def __init__(
        self,
        name: str,
        operands: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        parameters: Mapping[str, Any],
        at: Span,
        *,
        deltas: bool,
    ) -> None:
        self.name, self.parameters, self._at, self._deltas = name, parameters, at, deltas
        self._base = base
        self.inputs = [*operands] if base is None else [base, *operands]
        first = self.inputs[0]
        self.shape: tuple[int, ...] = tuple(first.shape)
        self.size, self.device = first.numel(), first.device
        self.wide = any(dtype_name(tensor) == "F64" for tensor in self.inputs)
        self._step = _CPU_BLOCK if self.device.type == "cpu" else _DEVICE_BLOCK
        self.starts: Sequence[int] = [*range(0, self.size, self._step), self.size]
        self._flat = [tensor.detach().reshape(-1) for tensor in self.inputs]

    def blocks(self) -> Iterator[Block]:
        return self.range(0, self.size)

    def range(self, start: int, stop: int) -> Iterator[Block]:
        """Elements [start, stop) in blocks."""
        for begin in range(start, stop, self._step):
            yield self._block(begin, min(begin + self._step, stop))

    def span(self, number: int) -> Iterator[Block]:
        """The blocks of one span."""
        return self.range(self.starts[number], self.starts[number + 1])

    def map(self, work: Callable[[Iterator[Block]], T], only: int | None = None) -> list[T]:
        numbers = range(len(self.starts) - 1) if only is None else [only]
        return [work(self.span(number)) for number in numbers]

    def sample(self, count: int) -> Iterator[Block]:
        if self.size <= count:
            yield from self.blocks()
            return
        for start, stop in sample_ranges(self.size, count):
            yield from self.range(start, stop)

    def _block(self, start: int, stop: int) -> Block:
        import torch

        kind = torch.float64 if self.wide else torch.float32
        arrays = [flat[start:stop].to(self.device, kind, copy=True) for flat in self._flat]
        finite = all_finite(arrays)
        base = arrays.pop(0) if self._base is not None else None
        if base is not None and self._deltas:
            arrays = [array.sub_(base) for array in arrays]
        at = Span(self.name, start, self._at.seed, self._at.sources)
        return Block(base, arrays, at, finite)
