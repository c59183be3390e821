"""A weight with its LoRA update, computed while it is read: W + s B A, and DoRA's rescaled rows.

LoRA: Hu et al., arXiv:2106.09685; DoRA: Liu et al., arXiv:2402.09353. Equal to what PEFT's
`merge_and_unload` makes, in float32 and rounded only where the merge's output is.

One layer's weight with its factors: whether they fit, and what they make.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.dtypes import MERGEABLE
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor, read_numbers
from merge_cli.kernels.matrices import low_rank_product
from merge_cli.lora import experts
from merge_cli.lora.adapter import Parts
from merge_cli.lora.config import by_pattern

_KEPT = 16  # updates whose smaller factor stays in memory: blocks of one weight follow each other


@dataclass(frozen=True)
class UpdatedTensor(Float32):
    """`weight` with an update. See `tensors.Tensor`.

    Attributes:
        left, right: factors of the update, stored [rows, rank] and [rank, columns]; or, with
            `turned`, [rank, rows] and [columns, rank]: of embeddings, and layers stored [in, out].
        scale: of their product.
        magnitude: DoRA's length of each row; None without.
        stamp: of the adapter's file, so that another one at its place is not taken for it.
    """

    weight: Tensor
    left: TensorRef
    right: TensorRef
    scale: float
    turned: bool = False
    magnitude: TensorRef | None = None
    stamp: str = ""

    @property
    def made_of(self) -> Tensor:
        return self.weight

    @property
    def native(self) -> str:
        return self.weight.native

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        extra = (self.magnitude,) if self.magnitude else ()
        return (*self.weight.stored, self.left, self.right, *extra)

    @property
    def formula(self) -> str:
        update = f"low-rank update, scale {self.scale!r}, turned {self.turned}, {self.stamp}"
        return f"{self.weight.formula}; {update}"

    @property
    def rank(self) -> int:
        return self.left.shape[0 if self.turned else 1]

    def factors(self, read: Read) -> tuple[Any, Any]:
        """The update as a product, its scale aside: numpy float32 [rows, rank], [rank, columns]."""
        return self._left(read, 0, self.shape[0]), self._right(read)

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """Whole rows are computed, of which the buffer gets its part."""
        import numpy as np

        count = len(buffer) // 4
        columns = self.shape[1]
        first, last = start // columns, -(-(start + count) // columns)
        rows = read_numbers(read, self.weight, first * columns, (last - first) * columns)
        rows = rows.reshape(last - first, columns)
        update = low_rank_product(self._left(read, first, last), self._right(read))
        rows += np.float32(self.scale) * update
        if self.magnitude is not None:
            requested = read_numbers(read, self.magnitude, first, last - first)
            # The length of each row by itself, in float64: it depends on no other row.
            lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
            rows *= (requested / lengths).astype(np.float32)[:, None]
        out = np.frombuffer(buffer, np.float32)
        begin = start - first * columns
        out[:] = rows.reshape(-1)[begin : begin + count]

    def _left(self, read: Read, first: int, last: int) -> Any:
        """Rows [first, last) of the left factor."""
        import numpy as np

        if not self.turned:
            rank = self.left.shape[1]
            numbers = read_numbers(read, self.left, first * rank, (last - first) * rank)
            return numbers.reshape(last - first, rank)
        rank, rows = self.left.shape
        parts = [read_numbers(read, self.left, k * rows + first, last - first) for k in range(rank)]
        return np.stack(parts, axis=1)

    def _right(self, read: Read) -> Any:
        """The right factor, whole."""
        import numpy as np

        with _lock:
            cached = _recent.get(self)
            if cached is not None:
                _recent.move_to_end(self)
                return cached
        result = read_numbers(read, self.right, 0, self.right.size).reshape(self.right.shape)
        result = np.ascontiguousarray(result.T) if self.turned else result
        with _lock:
            _recent[self] = result
            while len(_recent) > _KEPT:
                _recent.popitem(last=False)
        return result


@dataclass(frozen=True)
class ShiftedTensor(Float32):
    """`bias` plus `scale` times the bias of a factor (PEFT's lora_bias). See `tensors.Tensor`."""

    bias: Tensor
    change: TensorRef
    scale: float
    stamp: str

    @property
    def made_of(self) -> Tensor:
        return self.bias

    @property
    def native(self) -> str:
        return self.bias.native

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (*self.bias.stored, self.change)

    @property
    def formula(self) -> str:
        return f"{self.bias.formula}; shifted, scale {self.scale!r}, {self.stamp}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        change = read_numbers(read, self.change, start, len(out))
        out[:] = read_numbers(read, self.bias, start, len(out)) + np.float32(self.scale) * change


_recent: OrderedDict[UpdatedTensor, Any] = OrderedDict()
_lock = threading.Lock()


# transformers' classes with layers that are stored [in, out], and what those are called.
_WITH_CONV1D = frozenset(
    (
        "gpt2",
        "openai-gpt",
        "imagegpt",
        "decision_transformer",
        "clvp",
        "clvp_decoder",
    )
)
_CONV1D = frozenset(("c_attn", "q_attn", "c_fc", "c_proj"))


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What the product of a module's factors is multiplied with: alpha / r, or alpha / sqrt(r)."""
    return experts.scale_of(config, module, rank)


def contradictions(
    layers: Mapping[str, Parts], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The first module whose tensors are not what the config says, and why."""
    missing = next((m for m, parts in layers.items() if "magnitude" not in parts), None)
    if config.get("use_dora") and missing is not None:
        yield missing, "use_dora is set, and the adapter has no magnitude for it"
    result = next((m for m, parts in layers.items() if "magnitude" in parts), None)
    if config.get("use_dora") is False and result is not None:
        yield result, "the adapter has a magnitude for it, and use_dora is not set"


def is_turned(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, kind: str
) -> bool:
    """Whether a layer is stored [in, out].

    `fan_in_fan_out` is what PEFT found of the last layer that it wrapped: beside a head it is
    false for all of GPT-2's. So the class says it, where it is known to have such layers, and
    the shapes otherwise.

    Args:
        kind: the model_type.
    """
    named = module.removesuffix(".base_layer").rpartition(".")[2] in _CONV1D
    if kind in _WITH_CONV1D:
        return named
    straight = (parts["b"].shape[0], parts["a"].shape[-1])
    if straight[0] != straight[1] and weight.shape in (straight, straight[::-1]):
        return weight.shape != straight
    # PEFT takes no notice of it where the layer is an ordinary one.
    return bool(config.get("fan_in_fan_out")) and (named or not kind)


def why_unusable(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, kind: str
) -> str:
    """Why a module's factors do not fit its weight; empty when they do."""
    if "bias" in parts and "magnitude" in parts:
        return "DoRA with biases of its own (lora_bias) is not applied here"
    embedding = "embedding_a" in parts
    names = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    missing = [name for name in names if name not in parts]
    if missing:
        return f"the adapter lacks a factor ({', '.join(missing)})"
    extra = parts.keys() - {*names, "magnitude", "bias"}
    if extra:
        return "the adapter has factors of a layer and of an embedding for it"
    if weight.dtype not in MERGEABLE or weight.dtype == "F64":
        return f"its weight ({weight.native}) cannot be updated"
    if len(weight.shape) != 2 or any(len(parts[name].shape) != 2 for name in names):
        message = f"only matrices are updated, not {list(weight.shape)}"
        return f"{message}: merge the adapter with PEFT (`merge_and_unload`), and name the result"
    a, b = (parts[name].shape for name in names)
    requested = (b[0], a[1])
    turned = not embedding and is_turned(weight, parts, config, module, kind)
    if embedding or turned:
        requested = (a[1], b[0])
    if a[0] != b[1] or requested != weight.shape or not a[0]:
        return f"factors {list(a)} and {list(b)} do not make {list(weight.shape)}"
    if "magnitude" in parts and (embedding or turned):
        return "DoRA is not applied to embeddings and to layers that are stored [in, out]"
    if "magnitude" in parts and parts["magnitude"].size != weight.shape[0]:
        return (
            f"its magnitude {list(parts['magnitude'].shape)} is not that of {weight.shape[0]} rows"
        )
    said = by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if type(said) is int and said != a[0]:
        return f"its factors have the rank {a[0]}, and {said} is what adapter_config.json says"
    return ""


def updated(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, kind: str, stamp: str
) -> UpdatedTensor:
    if "embedding_a" in parts:
        a, b = parts["embedding_a"], parts["embedding_b"]
        return UpdatedTensor(weight, a, b, scaling(config, module, a.shape[0]), True, None, stamp)
    a, b = parts["a"], parts["b"]
    scale = scaling(config, module, a.shape[0])
    if is_turned(weight, parts, config, module, kind):
        return UpdatedTensor(weight, a, b, scale, True, None, stamp)
    return UpdatedTensor(weight, b, a, scale, False, parts.get("magnitude"), stamp)
