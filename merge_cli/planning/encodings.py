"""`out_dtype:` fp8, int4, ... and `same`: which tensors are written in codes, and in which.

Written in codes are the matrices that the reference stores so. Where it stores none, these are the
linear layers and experts of numbered layers, without routers, norms, embeddings, heads,
state-space mixers, and vision and audio towers. `same` writes each of them as the
reference stores it; a tensor that no method changes is copied byte for byte. What a format cannot
hold is refused here, by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.layout import natural_key
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import Problem
from merge_cli.formats.detect import encoding_for
from merge_cli.formats.encoding import Encoded, Encoding, Verbatim, encoded_part, stored_parts
from merge_cli.formats.packed import PACKED
from merge_cli.formats.storage_format import QUANTIZATION, quantised_as, quantization_of
from merge_cli.formats.stored_parts import is_activation
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.recipe.fields import FP8, SAME
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source

_BLOCK = 128  # rows and columns that share a scale in `out_dtype: fp8`
# Their layers are stored [in, out] by a class that transformers does not read in codes.
_TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_LAYER = re.compile(r"(^|\.)\d+\.")
_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_WHOLE = re.compile(
    r"embed|norm|router|conv|lm_head|wte|wpe|visual|vision|audio|mamba|mixer|dt_proj|x_proj"
    r"|(^|[._])gate\.weight$"
)
_NAMED = ("ignore", "modules_to_not_convert")  # lists of modules in `quantization_config`
_SHOWN = 3  # tensors that a problem names


@dataclass(frozen=True)
class Decision:
    """How a tensor is written.

    Attributes:
        encoding: None for plain numbers.
        kept: computed from blocks in that encoding, which are written again where they are still
            the same numbers; None for none.
        problem: why it cannot be written; empty where it can.
    """

    encoding: Encoding | None = None
    kept: Tensor | None = None
    problem: str = ""


class EncodingChoice:
    """Which output tensors are written in codes: decided by the reference and by names."""

    def __init__(self, recipe: Recipe, config_source: Source, sources: Sequence[Source]) -> None:
        self._word, self._source = recipe.out_dtype or "", config_source
        self._is_stored = _in_fp8 if self._word.startswith(FP8) else _in_codes
        self._any_stored = any(map(self._is_stored, config_source.tensors.values()))
        self._has_activations = any(is_activation(ref.name) for ref in config_source.left_out)
        # Which models are quantised as the reference is, whatever modules they leave out.
        reference, *others = (
            {key: value for key, value in _words(source).items() if key not in _NAMED}
            for source in (config_source, *sources)
        )
        self._are_alike = [words == reference for words in others]

    @property
    def keeps(self) -> bool:
        """Whether every tensor keeps its format."""
        return self._word == SAME

    def of(self, name: str, reference: Tensor, dtype: str) -> Decision:
        """How a tensor that is merged is written.

        Args:
            reference: the base's tensor, or the first model's.
            dtype: what it would be written in as plain numbers.
        """
        if not reference.size:
            return Decision()
        coded = self._is_stored(reference)
        part = encoded_part(reference) if coded else None
        stored = part.encoding if part is not None else None
        if self.keeps:
            return self._same(reference, part, stored) if coded else Decision()
        encoding = encoding_for(self._word, dtype, self._source.config)
        # Words of eight bits say themselves what shares a scale; those of four bits leave it to
        # the model, if it is stored so already.
        if isinstance(stored, Encoding) and self._is_like(stored, encoding):
            return Decision(stored, _kept(stored, part, reference))
        if not self._is_chosen(name, reference, encoding, coded):
            return Decision()
        unfit = encoding.unfit(reference.shape)
        return Decision(problem=unfit) if unfit else Decision(encoding)

    def of_copy(self, name: str, tensor: Tensor, dtype: str, source: int) -> Decision:
        """How a tensor that no method changes is written.

        Args:
            source: index of the model that it is from.
        """
        if not self.keeps or not isinstance(tensor, Encoded):
            return self.of(name, tensor, dtype)
        if not self._are_alike[source]:
            return Decision(problem="its model is quantised in another way than the reference")
        assert not isinstance(tensor, TensorRef)
        return Decision(Verbatim(tensor.stored, tensor.name))

    def _same(
        self, reference: Tensor, part: Encoded | None, stored: Encoding | str | None
    ) -> Decision:
        if stored is None:
            return Decision(problem=_REARRANGED)
        if isinstance(stored, str):
            return Decision(problem=stored)
        return Decision(stored, _kept(stored, part, reference))

    def _is_like(self, stored: Encoding, encoding: Encoding) -> bool:
        """Whether the model's own form serves for a word: not with activations to be measured."""
        needs_activations = stored.family == "modelopt" and self._has_activations
        return stored.label == encoding.label != "F8_E4M3" and not needs_activations

    def _is_chosen(self, name: str, tensor: Tensor, encoding: Encoding, coded: bool) -> bool:
        shape = tensor.shape
        if len(shape) < 2 or (encoding.only_stacks and len(shape) == 2):
            return False
        blocks = self._word == FP8  # whose partial blocks only a model that has some is given
        if blocks and len(shape) > 2 and shape[-2] % _BLOCK:
            return False
        if self._any_stored:
            return coded
        linear = len(shape) == 2 and name.endswith(".weight") and bool(_LAYER.search(name))
        layer = (linear and not _WHOLE.search(name)) or bool(_EXPERTS.search(name))
        even = shape[-2] % _BLOCK == 0 and shape[-1] % _BLOCK == 0
        return layer and (even or not blocks)


_REARRANGED = "it is computed from several stored parts, or from a GGUF file, and has no format"


def _kept(encoding: Encoding, part: Any, reference: Tensor) -> Tensor | None:
    """The tensor with the blocks, if they are in the very tensors that are written."""
    if part is None or not stored_parts(encoding, part.name, reference.shape, part):
        return None
    kept: Tensor = part
    return kept


def _in_fp8(tensor: Tensor) -> bool:
    kind = tensor.stored[0].dtype if tensor.stored else ""
    return kind.startswith("F8_E") and kind != "F8_E8M0"


def _in_codes(tensor: Tensor) -> bool:
    """Whether a tensor of numbers is computed from codes."""
    if isinstance(tensor, TensorRef):
        return False
    return any(ref.dtype in PACKED for ref in tensor.stored[:1]) or _in_fp8(tensor)


def _words(source: Source) -> Mapping[str, Any]:
    """What a source's config says of its quantisation."""
    words = quantization_of(source.quantization) or source.quantization.get("quantization")
    return words if isinstance(words, dict) else {}


def problems(
    recipe: Recipe, config_source: Source, tasks: Sequence[TensorTask], refused: Mapping[str, str]
) -> Iterator[Problem]:
    """Why this model cannot be written as the recipe asks for it.

    Args:
        refused: tensor -> why it cannot be written.
    """
    if not recipe.quantises:
        return
    word = recipe.out_dtype
    kind = text_config(config_source.config).get("model_type")
    coded = [task for task in tasks if task.encoding is not None]
    merged = [task for task in coded if not task.moved]
    if kind in _TURNED and (merged or refused or word != SAME):
        message = f"{kind} stores its layers [in, out], which is not read in {word}."
        yield recipe.problem("out_dtype", message, "Use bfloat16.")
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
        message = f"{count} cannot be written in {word} ({shown}): {reason}."
        yield recipe.problem("out_dtype", message, "Use bfloat16.")
    if word != SAME:
        if not coded and not refused:
            reason = "no layer has rows and columns in multiples of 128"
            message = reason if word == FP8 else "no layer or stack of experts is written in it"
            yield recipe.problem("out_dtype", f"{message}.", "Use bfloat16.")
        if len({task.encoding.family for task in coded if task.encoding}) > 1:
            message = (
                "some layers keep a form that one config.json cannot describe with the others."
            )
            yield recipe.problem("out_dtype", message, "Use bfloat16.")
        return
    activations = [ref.name for ref in config_source.left_out if is_activation(ref.name)]
    if activations and merged:
        message = (
            f"{config_source.label} has scales of activations ({activations[0]}, ...), which would "
            "have to be measured again for merged weights."
        )
        hint = "Use a word that says how weights are stored (int4, nvfp4, fp8_row)."
        yield recipe.problem("out_dtype", message, hint)
    if coded and not _words(config_source) and any(not _is_plain_fp8(task) for task in coded):
        message = "config.json does not say how its weights are quantised, which could not be kept."
        yield recipe.problem("out_dtype", message, "Use bfloat16.")
    if coded and recipe.all_slices and any(s.layer_range for s in recipe.source_specs):
        numbered = [name for name in _names(_words(config_source)) if _LAYER.search(name)]
        if numbered or config_source.left_out:
            where = numbered[0] if numbered else config_source.left_out[0].name
            message = f"its quantisation names layers by number ({where}), which slices change."
            yield recipe.problem("out_dtype", message, "Use bfloat16.")


def _is_plain_fp8(task: TensorTask) -> bool:
    return task.encoding is not None and task.encoding.label.startswith("F8_E")


def _names(words: Any) -> Iterator[str]:
    """Every text in what a config says."""
    if isinstance(words, str):
        yield words
    elif isinstance(words, dict):
        for key, value in words.items():
            yield from _names([key, value])
    elif isinstance(words, list):
        for value in words:
            yield from _names(value)


def left_out_tasks(
    recipe: Recipe, source: Source, index: int, tasks: Sequence[TensorTask]
) -> tuple[TensorTask, ...]:
    """With `same`, what the reference stores besides weights is copied, too."""
    if recipe.out_dtype != SAME or not any(task.encoding is not None for task in tasks):
        return tuple(tasks)
    extra = [
        TensorTask(ref.name, ref.shape, ref.dtype, "copy", (ref,), (index,), (), group=ref.name)
        for ref in source.left_out
    ]
    return tuple(sorted((*tasks, *extra), key=lambda task: natural_key(task.name)))


def described(plan: Plan) -> Plan:
    """A plan whose config says what is written in codes, if something is."""
    coded = [task for task in plan.tasks if task.encoding is not None]
    if not coded or not plan.config:
        return plan
    by_encoding: dict[Encoding, list[str]] = {}
    for task in coded:
        if task.encoding is not None and not isinstance(task.encoding, Verbatim):
            by_encoding.setdefault(task.encoding, []).append(task.name.removesuffix(".weight"))
    notes = list(_notes(coded, max(1, plan.parameter_count)))
    if plan.recipe.out_dtype == SAME:
        config = quantised_as(plan.config, plan.sources[plan.config_index].quantization)
    else:
        unconverted = _modules(task for task in plan.tasks if task.encoding is None)
        settings = next(iter(by_encoding)).settings(by_encoding, unconverted)
        config = {**plan.config, QUANTIZATION: settings}
    return replace(plan, config=config, notes=(*plan.notes, *notes))


def _notes(coded: Sequence[TensorTask], total: int) -> Iterator[str]:
    """A line for each way in which weights are written."""
    ways: dict[str, list[TensorTask]] = {}
    for task in coded:
        assert task.encoding is not None
        names = {"F8_E4M3": "fp8", "F8_E5M2": "fp8 (E5M2)"}
        name = names.get(task.encoding.label, task.encoding.label)
        way = f"written in {name}, with {task.encoding.described}"
        if isinstance(task.encoding, Verbatim):
            way = "copied byte for byte in their format"
        ways.setdefault(way, []).append(task)
    for way, tasks in ways.items():
        share = sum(task.size for task in tasks) / total
        yield f"{len(tasks)} matrices ({share:.0%} of the weights) are {way}"
    yield "everything that is not in codes is written in its dtype"


def _modules(tasks: Iterable[TensorTask]) -> Sequence[str]:
    """The modules of matrices that stay as they are, as transformers calls them; the head even
    where it is tied, and so has no tensor."""
    names = ["lm_head"]
    for task in tasks:
        if len(task.shape) > 1:
            name = task.name.removesuffix(".weight")
            names.append(name if name != task.name else name.rpartition(".")[0])
    return list(dict.fromkeys(names))
