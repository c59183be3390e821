"""A layer's weight with its LoRA update, computed while it is read: W + s B A, or DoRA.

LoRA: Hu et al., arXiv:2106.09685; DoRA: Liu et al., arXiv:2402.09353. Equal to what PEFT's
`merge_and_unload` makes, in float32 and rounded only where the merge's output is. Here, too, is
the check whether factors fit their weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from merge_cli.checkpoint.config import WITH_CONV1D
from merge_cli.checkpoint.dtypes import MERGEABLE
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor, fill_rows, read_numbers
from merge_cli.kernels.matrices import add_low_rank
from merge_cli.lora.adapter import EMBEDDING_FACTORS, LAYER_FACTORS, Parts
from merge_cli.lora.config import configured_rank, scale_of
from merge_cli.lora.expert_factors import read_cached

# What transformers' layers that are stored [in, out] are called.
_CONV1D = frozenset(("c_attn", "q_attn", "c_fc", "c_proj"))


@dataclass(frozen=True)
class UpdatedTensor(Float32):
    """`weight` with an update. See `tensors.Tensor`.

    Attributes:
        left, right: factors of the update, stored [rows, rank] and [rank, columns]; or, with
            `transposed`, [rank, rows] and [columns, rank]: embeddings, layers stored [in, out].
        scale: of their product.
        magnitude: DoRA's length of each row; None without.
        fingerprint: of the adapter's file: another file at the same path has another one.
    """

    weight: Tensor
    left: TensorRef
    right: TensorRef
    scale: float
    transposed: bool = False
    magnitude: TensorRef | None = None
    fingerprint: str = ""

    is_update = True

    @property
    def made_of(self) -> Tensor:
        return self.weight

    @property
    def default_dtype(self) -> str:
        return self.weight.default_dtype

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        extra = (self.magnitude,) if self.magnitude else ()
        return (*self.weight.stored, self.left, self.right, *extra)

    @property
    def formula(self) -> str:
        update = (
            f"low-rank update, scale {self.scale!r}, turned {self.transposed}, {self.fingerprint}"
        )
        return f"{self.weight.formula}; {update}"

    @property
    def rank(self) -> int:
        return self.left.shape[0 if self.transposed else 1]

    def factors(self, read: Read) -> tuple[Any, Any]:
        """The update as a product, its scale aside: numpy float32 [rows, rank], [rank, columns]."""
        return self._left(read, 0, self.shape[0]), self._right(read)

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        fill_rows(buffer, start, self.shape[1], partial(self._rows, read))

    def _rows(self, read: Read, first: int, last: int) -> Any:
        """Rows [first, last) of the updated weight."""
        import numpy as np

        columns = self.shape[1]
        rows = read_numbers(read, self.weight, first * columns, (last - first) * columns)
        rows = rows.reshape(last - first, columns)
        add_low_rank(self._left(read, first, last), self._right(read), self.scale, rows)
        if self.magnitude is not None:
            magnitudes = read_numbers(read, self.magnitude, first, last - first)
            # The length of each row by itself, in float64: it depends on no other row.
            lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
            rows *= (magnitudes / lengths).astype(np.float32)[:, None]
        return rows

    def _left(self, read: Read, first: int, last: int) -> Any:
        """Rows [first, last) of the left factor."""
        import numpy as np

        if not self.transposed:
            rank = self.left.shape[1]
            numbers = read_numbers(read, self.left, first * rank, (last - first) * rank)
            return numbers.reshape(last - first, rank)
        rank, rows = self.left.shape
        parts = [read_numbers(read, self.left, k * rows + first, last - first) for k in range(rank)]
        return np.stack(parts, axis=1)

    def _right(self, read: Read) -> Any:
        """The complete right factor."""
        import numpy as np

        factor = read_cached(read, self.right, self.fingerprint).reshape(self.right.shape)
        return np.ascontiguousarray(factor.T) if self.transposed else factor


@dataclass(frozen=True)
class ShiftedTensor(Float32):
    """`bias` plus `scale` times the bias of a factor (PEFT's lora_bias). See `tensors.Tensor`."""

    bias: Tensor
    change: TensorRef
    scale: float
    fingerprint: str

    is_update = True

    @property
    def made_of(self) -> Tensor:
        return self.bias

    @property
    def default_dtype(self) -> str:
        return self.bias.default_dtype

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (*self.bias.stored, self.change)

    @property
    def formula(self) -> str:
        return f"{self.bias.formula}; shifted, scale {self.scale!r}, {self.fingerprint}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        change = read_numbers(read, self.change, start, len(out))
        out[:] = read_numbers(read, self.bias, start, len(out)) + np.float32(self.scale) * change


def contradictions(
    layers: Mapping[str, Parts], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The first module whose tensors contradict the config, and why."""
    for key, part, noun in (("use_dora", "magnitude", "magnitude"), ("lora_bias", "bias", "bias")):
        is_set = bool(config.get(key))
        module = next((m for m, parts in layers.items() if (part in parts) != is_set), None)
        if module is not None and is_set:
            yield module, f"{key} is set, and the adapter has no {noun} for it"
        elif module is not None:
            yield module, f"the adapter has a {noun} for it, and {key} is not set"


def is_transposed(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, kind: str
) -> bool:
    """Whether a layer is stored [in, out].

    `fan_in_fan_out` describes only the last layer that PEFT wrapped: with a head it is false for
    all of GPT-2's layers. So the model's class decides where it is known to have such layers, and
    the shapes decide otherwise.

    Args:
        kind: the model_type.
    """
    is_conv1d = module.removesuffix(".base_layer").rpartition(".")[2] in _CONV1D
    if kind in WITH_CONV1D:
        return is_conv1d
    plain_shape = (parts["b"].shape[0], parts["a"].shape[-1])
    if plain_shape[0] != plain_shape[1] and weight.shape in (plain_shape, plain_shape[::-1]):
        return weight.shape != plain_shape
    # PEFT ignores `fan_in_fan_out` for ordinary linear layers.
    return bool(config.get("fan_in_fan_out")) and (is_conv1d or not kind)


def why_unusable(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, kind: str
) -> str:
    """Why a module's factors do not fit its weight; empty when they do."""
    if "bias" in parts and "magnitude" in parts:
        return "DoRA with biases (lora_bias) is not supported"
    embedding = "embedding_a" in parts
    names = EMBEDDING_FACTORS if embedding else LAYER_FACTORS
    missing = [name for name in names if name not in parts]
    if missing:
        return f"the adapter lacks a factor ({', '.join(missing)})"
    extra = parts.keys() - {*names, "magnitude", "bias"}
    if extra:
        return "the adapter has factors of a layer and of an embedding for it"
    if weight.dtype not in MERGEABLE or weight.dtype == "F64":
        return f"its weight ({weight.default_dtype}) cannot be updated"
    if len(weight.shape) != 2 or any(len(parts[name].shape) != 2 for name in names):
        message = f"only matrices are updated, not {list(weight.shape)}"
        return f"{message}: merge the adapter with PEFT (`merge_and_unload`), and name the result"
    a, b = (parts[name].shape for name in names)
    shape = (b[0], a[1])
    transposed = not embedding and is_transposed(weight, parts, config, module, kind)
    if embedding or transposed:
        shape = (a[1], b[0])
    if a[0] != b[1] or shape != weight.shape or not a[0]:
        return f"factors {list(a)} and {list(b)} do not make {list(weight.shape)}"
    if "magnitude" in parts and (embedding or transposed):
        return "DoRA is not applied to embeddings and to layers that are stored [in, out]"
    if "magnitude" in parts and parts["magnitude"].size != weight.shape[0]:
        return (
            f"its magnitude {list(parts['magnitude'].shape)} is not that of {weight.shape[0]} rows"
        )
    rank = configured_rank(config, module)
    if type(rank) is int and rank != a[0]:
        return f"its factors have the rank {a[0]}, but adapter_config.json says {rank}"
    return ""


def update_weight(
    weight: Tensor,
    parts: Parts,
    config: Mapping[str, Any],
    module: str,
    kind: str,
    fingerprint: str,
) -> UpdatedTensor:
    if "embedding_a" in parts:
        a, b = parts["embedding_a"], parts["embedding_b"]
        return UpdatedTensor(
            weight, a, b, scale_of(config, module, a.shape[0]), True, None, fingerprint
        )
    a, b = parts["a"], parts["b"]
    scale = scale_of(config, module, a.shape[0])
    if is_transposed(weight, parts, config, module, kind):
        return UpdatedTensor(weight, a, b, scale, True, None, fingerprint)
    return UpdatedTensor(weight, b, a, scale, False, parts.get("magnitude"), fingerprint)
