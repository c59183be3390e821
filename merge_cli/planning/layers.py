"""Layers and modules, read from tensors' names, so that any architecture will do.

The first number in a name is its layer: `model.layers.7.mlp.up_proj.weight` is layer 7 of the
stack `model.layers`. A model may have several stacks (encoder and decoder, vision and text);
`layer_range` counts in the one that has as many layers as the config says. A number of more than
five digits is no layer's, since loops run over layers.

A module of a `modules:` section goes by mergekit's name for it, or by a part of the tensors' own
names, between dots:

    text_decoder, vision_tower, multi_modal_projector, audio_tower    by what a multimodal name says
    shared                    of encoder-decoder models: the shared embedding and the output head
    default                   what no other listed module has
    encoder, model.visual     tensors whose name has these parts
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from merge_cli.checkpoint.config import layer_count, predicting_layers
from merge_cli.planning.around_layers import comes_after_layers

_LAYER = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<index>[0-9]{1,5})\.(?P<rest>.+)$")


class LayerKey(NamedTuple):
    """A layer of a stack, by its number, and the rest of the name."""

    stack: str
    number: int
    rest: str

    def name(self, index: int) -> str:
        """The same tensor's name in another layer."""
        return f"{self.stack}.{index}.{self.rest}" if self.stack else f"{index}.{self.rest}"


def layer_key_of(name: str) -> LayerKey | None:
    """The layer that a tensor belongs to, or None."""
    match = _LAYER.match(name)
    return LayerKey(match["stack"] or "", int(match["index"]), match["rest"]) if match else None


class LayerKeys(dict[str, LayerKey | None]):
    """`layer_key_of` for the names of several models, which share most of them: found once."""

    def __missing__(self, name: str) -> LayerKey | None:
        key = self[name] = layer_key_of(name)
        return key


class Layer(NamedTuple):
    """A layer of a stack, by its number."""

    stack: str
    number: int


def layers_of(names: Sequence[str]) -> list[Layer | None]:
    """The layer of each name, as in `layer_key_of`; one object for names in a row."""
    result: list[Layer | None] = []
    # A name that goes on from another's `model.layers.7.` is in its layer: most need no expression.
    beginning, layer = "", None
    has_lines = "\n" in "".join(names)  # there the expression ends
    for name in names:
        if not beginning or not name.startswith(beginning) or name == beginning:
            match = _LAYER.match(name)
            layer = Layer(match["stack"] or "", int(match["index"])) if match else None
            # `1.w` goes on as `1.2.w`, which is in a layer of the stack `1`.
            is_clear = match and match["stack"] is not None and not has_lines
            beginning = name[: match.start("rest")] if match and is_clear else ""
        result.append(layer)
    return result


def layer_stacks(names: Iterable[str], layer_keys: LayerKeys | None = None) -> dict[str, int]:
    """Every stack and its number of layers."""
    keys = LayerKeys() if layer_keys is None else layer_keys
    return heights(keys[name] for name in names)


def heights(layers: Iterable[LayerKey | Layer | None]) -> dict[str, int]:
    """Every stack among these places and its number of layers."""
    result: dict[str, int] = {}
    for stack, index in dict.fromkeys(map(itemgetter(0, 1), filter(None, layers))):
        result[stack] = max(index + 1, result.get(stack, 0))
    return result


def main_stack(
    names: Iterable[str], config: Mapping[str, Any], layer_keys: LayerKeys | None = None
) -> str | None:
    """The stack that `layer_range` counts in; None where it is not clear which."""
    return _main_stack(layer_stacks(names, layer_keys), config)


def _main_stack(layer_counts: Mapping[str, int], config: Mapping[str, Any]) -> str | None:
    count = layer_count(config)
    described_counts = model_heights(layer_counts, config)
    fitting = [stack for stack, layers in described_counts.items() if layers == count]
    if config.get("is_encoder_decoder") and len(layer_counts) > 1:
        return None  # the count is the encoder's, or the decoder's, or that of both
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and len(layer_counts) == 1:
        return next(iter(layer_counts))
    return None


class LayerIndex:
    """Where the tensors of a model stand, found once for all the slices that are cut from it.

    Attributes:
        stacks: every stack and its number of layers.
        main: the stack that `layer_range` counts in; None where it is not clear which.
        layers: how many of it slices may take: all but those for multi-token prediction.
    """

    def __init__(
        self, names: Iterable[str], config: Mapping[str, Any], layer_keys: LayerKeys
    ) -> None:
        self._names, self._layer_keys = tuple(names), layer_keys
        self.stacks = heights(layer_keys[name] for name in self._names)
        self.main = _main_stack(self.stacks, config)
        layers = self.stacks.get(self.main, 0) if self.main is not None else 0
        predicting = predicting_layers(config)
        self.layers = layers - predicting if layers - predicting == layer_count(config) else layers
        # Numbers of tensors, by layer of the main stack and outside of it: a slice looks at its
        # own alone, so that many slices of a model take no longer than the model whole.
        self._layers: dict[int, list[int]] = {}
        self._before: list[int] = []
        self._after: list[int] = []
        for number, name in enumerate(self._names):
            key = layer_keys[name]
            if key is not None and key.stack == self.main:
                self._layers.setdefault(key.number, []).append(number)
            elif key is None and self.main is not None and comes_after_layers(name, self.main):
                self._after.append(number)
            else:
                self._before.append(number)

    def cut(
        self, layers: range, *, first: bool, last: bool
    ) -> Iterator[tuple[str, LayerKey | None]]:
        """Names in some layers of the main stack, in the model's order; a place where in one.

        Args:
            first, last: whether what stands before the layers, and after them, is wanted too.
        """
        chosen = chain(
            self._before if first else (),
            self._after if last else (),
            *(self._layers.get(layer, ()) for layer in layers),
        )
        for number in sorted(chosen):
            name = self._names[number]
            key = self._layer_keys[name]
            yield name, key if key is not None and key.stack == self.main else None


@dataclass(frozen=True, slots=True)
class LayerPosition:
    """A layer of a slice of the output.

    Attributes:
        group: what the report sums over: the layer, or the name of a tensor that has none.
        position: the layer's place in its slice, 0 (first, or no layer) to 1 (last, or the only
            one: a gradient's last value, as in mergekit).
        beyond: whether it stands behind the model's last layer.
        layer: its number within the slice, where that is a slice of a stack.
    """

    group: str
    position: float = 0.0
    beyond: bool = False
    layer: int | None = None


class LayerPositions:
    """The layers of a slice, each found once for all of its tensors.

    Args:
        heights: every stack's number of layers, in the output; what stands above that (layers for
            predicting several tokens, behind the model's last) is at the end.
        stack: the one that slices are cut from, where there are slices.
        start: the slice's first layer in it.
    """

    def __init__(self, heights: Mapping[str, int], stack: str | None, start: int) -> None:
        self._heights, self._stack, self._start = heights, stack, start

    def of(self, names: Sequence[str], layers: Sequence[Layer | None]) -> list[LayerPosition]:
        """The position of each name, given its layer."""
        positions = {layer: self._find(layer) for layer in {*layers} if layer is not None}
        return [
            LayerPosition(name) if layer is None else positions[layer]
            for name, layer in zip(names, layers, strict=True)
        ]

    def _find(self, key: Layer) -> LayerPosition:
        sliced = key.stack == self._stack
        first = self._start if sliced else 0
        last = self._heights[key.stack] - first - 1
        group = f"{key.stack}.{key.number}".lstrip(".")
        layer = key.number - first if sliced else None
        if key.number >= self._heights[key.stack]:
            return LayerPosition(group, 1.0, beyond=True, layer=layer)
        # One number alone is a layer where nothing is taller: `projector.0` beside layers is none.
        alone = 1.0 if sliced or max(self._heights.values()) == 1 else 0.0
        position = (key.number - first) / last if last > 0 else alone
        return LayerPosition(group, position, layer=layer)


def model_heights(layer_counts: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, int]:
    """The number of layers of every stack of a model: the config's word where it is lower.

    Args:
        layer_counts: the numbers of layers that the names make.
    """
    count = layer_count(config)
    text = {stack: layer_counts[stack] for stack in layer_counts if kind_of(f"{stack}.") == TEXT}
    if not count or count in text.values() or config.get("is_encoder_decoder"):
        return dict(layer_counts)
    above = [stack for stack, layers in text.items() if layers > count]
    return {**layer_counts, above[0]: count} if len(above) == 1 else dict(layer_counts)


TEXT, DEFAULT, SHARED = "text_decoder", "default", "shared"
# The first kind that one of a name's parts belongs to; a projector may stand inside of a tower.
_KINDS = {
    "multi_modal_projector": frozenset(
        (
            "multi_modal_projector",
            "mm_projector",
            "vision_projector",
            "projector",
            "connector",
            "merger",
            "deepstack_merger_list",
            "aligner",
            "embed_vision",
            "embed_audio",
        )
    ),
    "vision_tower": frozenset(
        (
            "vision_tower",
            "vision_model",
            "visual",
            "vision_encoder",
            "image_encoder",
        )
    ),
    "audio_tower": frozenset(("audio_tower", "audio_model", "audio_encoder")),
}
_ALIASES = {"vision_model": "vision_tower", "visual": "vision_tower"}


def kind_of(name: str) -> str:
    """What a tensor of a multimodal model belongs to."""
    parts = frozenset(name.split("."))
    return next((kind for kind, words in _KINDS.items() if parts & words), TEXT)


def members(module: str, listed: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The tensors of a module, in the model's order.

    Args:
        listed: every module of the recipe: `default` is what the others leave.
        names: all the model's tensors.
    """
    names = tuple(names)
    if module == DEFAULT:
        taken = {n for other in listed if other != DEFAULT for n in members(other, listed, names)}
        return tuple(name for name in names if name not in taken)
    kind = _ALIASES.get(module, module)
    if kind == TEXT or kind in _KINDS:
        result = tuple(name for name in names if kind_of(name) == kind)
        if result:
            return result
    parts = f".{module.strip('.')}."
    heads = (".lm_head.",) if module == SHARED else ()
    return tuple(n for n in names if any(part in f".{n}." for part in (parts, *heads)))


def known_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Names that would mean something in a model, for a message."""
    kinds = dict.fromkeys(kind_of(name) for name in names)
    return tuple(kinds) if len(kinds) > 1 else (*kinds, DEFAULT)
