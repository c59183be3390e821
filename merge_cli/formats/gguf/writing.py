"""The way back: a model of transformers as the tensors and keys of a GGUF file.

What is written is read again before a byte of it is: the config and the tokenizer that the keys
give must say what the model's own do. A model that the format cannot express is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.permuted_rows import PermutedRows, SourceRows
from merge_cli.checkpoint.tensor_parts import JoinedTensor
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import SourceError
from merge_cli.formats.gguf.architectures import (
    ARCHITECTURES,
    Expected,
    Shapes,
    expected_tensors,
    is_norm,
)
from merge_cli.formats.gguf.blocks import F16, F32, BlockType
from merge_cli.formats.gguf.header import DEFAULT_ALIGNMENT, ROPE_FACTORS, BlockTensor, padded
from merge_cli.formats.gguf.header_bytes import header_bytes
from merge_cli.formats.gguf.keys import (
    as_transformers_reads,
    check_config,
    keys_of,
    rotary_factors,
    shapes_of,
)
from merge_cli.formats.gguf.model import Shifted

_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # of `general.file_type`


@dataclass(frozen=True)
class Piece:
    """A tensor to write: its name in the file, its blocks, and where its numbers come from."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    tensor: Tensor | None  # None for the factors of rotary frequencies
    numbers: Any = None

    @property
    def entry(self) -> BlockTensor:
        """As the header lists it."""
        return BlockTensor(self.name, self.kind, self.shape, 0)

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes


@dataclass(frozen=True)
class GgufPlan:
    """A file, decided.

    Attributes:
        header: its bytes up to the data.
        pieces: its tensors in their order.
    """

    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        end = 0
        for piece in self.pieces:
            end = padded(end, DEFAULT_ALIGNMENT) + piece.nbytes
        return len(self.header) + end


def plan_file(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    vocabulary: Mapping[str, Any],
    kind: BlockType,
    label: str,
) -> GgufPlan:
    """Decide a file from a model's headers.

    Args:
        vocabulary: the keys of its tokenizer.
        kind: of matrices; norms and biases are float32, as llama.cpp writes them.

    Raises:
        SourceError: a model that the format cannot express.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        message = f"a model of the type '{model_type[:60]}', which is not written as GGUF"
        raise SourceError(message, model=label, hint=f"Written are {', '.join(ARCHITECTURES)}.")
    settings = as_transformers_reads(config, label)
    shapes = shapes_of(settings, model_type)
    values = {**keys_of(settings, model_type, shapes), **vocabulary}
    values["general.file_type"] = _FILE_TYPES[kind.name]
    expected = _expected(model_type, shapes, tensors, label)
    pieces = [_piece(item, tensors, model_type, shapes, kind) for item in expected]
    check_config(values, [piece.entry for piece in pieces], settings, model_type, label)
    factors = rotary_factors(settings, shapes, label)
    if factors is not None:
        pieces.append(Piece(ROPE_FACTORS, F32, factors.shape, None, factors))
    return GgufPlan(header_bytes(values, [piece.entry for piece in pieces]), tuple(pieces))


def _expected(
    model_type: str, shapes: Shapes, tensors: Mapping[str, Tensor], label: str
) -> list[Expected]:
    """The file's tensors in their order, with the model's names.

    Raises:
        SourceError: tensors that the architecture has not, or lacks, or of other shapes.
    """
    kind = ARCHITECTURES[model_type]

    class Everything:
        def __contains__(self, name: object) -> bool:
            return True

    possible = {
        new: item.name
        for item in expected_tensors(kind, shapes, Everything())
        for new in item.names
    }
    unknown = [name for name in tensors if name not in possible]
    present = {possible[name] for name in tensors if name in possible}
    expected = list(expected_tensors(kind, shapes, present))
    pairs = [(new, item) for item in expected for new in item.names]
    missing = [new for new, _ in pairs if new not in tensors]
    extra = present - {item.name for item in expected}
    wrong = [n for n, item in pairs if n in tensors and tensors[n].shape != item.new_shape]
    for names, relation in (
        (unknown, "GGUF has no name for it"),
        (missing, "it is missing"),
        (sorted(extra), "its config has no place for it"),
        (wrong, "its shape is not that of its config"),
    ):
        if names:
            raise SourceError(
                f"cannot be written as GGUF: {relation}", model=label, tensor=names[0]
            )
    return expected


def _piece(
    item: Expected,
    tensors: Mapping[str, Tensor],
    model_type: str,
    shapes: Shapes,
    kind: BlockType,
) -> Piece:
    architecture = ARCHITECTURES[model_type]
    tensor = tensors[item.names[0]]
    if len(item.names) > 1:
        tensor = JoinedTensor(item.name, item.shape, [tensors[name] for name in item.names])
    heads = shapes.heads if ".attn_q." in item.name else shapes.kv_heads
    if architecture.interleaved and (".attn_q." in item.name or ".attn_k." in item.name):
        tensor = _pairs(tensor, heads)
    if architecture.norms_from_one and is_norm(item.name):
        tensor = Shifted(tensor, 1.0)
    is_router = ".ffn_gate_inp." in item.name
    chosen = kind if len(item.shape) > 1 and not is_router else F32
    if item.shape[-1] % chosen.elements:
        chosen = F16  # rows that are no blocks, as llama.cpp does
    return Piece(item.name, chosen, item.shape, tensor)


def _pairs(tensor: Tensor, heads: int) -> Tensor:
    """The rows of each head from halves to pairs: the inverse of what reading does."""
    import numpy as np

    rows = tensor.shape[0]
    order = np.arange(rows, dtype=np.int64).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return PermutedRows(tensor, (tensor,), SourceRows(np.zeros(rows, np.int32), order, {}))
