"""What a GGUF file says of its model, as Hugging Face has it: names, orders of rows, config.json.

An architecture is understood whole: every tensor of the file has a name and the shape that the
config gives it, none is missing, and what else the config says is either written down or refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_cli.checkpoint.dtypes import DTYPES
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.permuted_rows import PermutedRows, SourceRows
from merge_cli.checkpoint.tensors import Float32, Read, Tensor, read_numbers
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    Expected,
    Shapes,
    expected_tensors,
    is_norm,
    model_type_of,
    with_bias,
)
from merge_cli.formats.gguf.blocks import DequantizedBlocks
from merge_cli.formats.gguf.config import config_of
from merge_cli.formats.gguf.header import ROPE_FACTORS, BlockTensor, Header
from merge_cli.formats.storage_format import DecodedModel

_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")
_ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")  # float32 in every file, as norms are


@dataclass(frozen=True)
class Shifted(Float32):
    """A tensor plus a number, in float32. See `tensors.Tensor`."""

    tensor: Tensor
    amount: float

    @property
    def made_of(self) -> Tensor:
        return self.tensor

    @property
    def default_dtype(self) -> str:
        return self.tensor.default_dtype

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.tensor.stored

    @property
    def formula(self) -> str:
        return f"({self.tensor.formula}) + {self.amount}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        out[:] = read_numbers(read, self.tensor, start, len(out)) + np.float32(self.amount)


def decode(header: Header, file: str, label: str, link: Path) -> DecodedModel:
    """A file's tensors by Hugging Face's names, and its config.json.

    Args:
        file: its name, for messages.
        link: where the tensors will be read from: a link to the file, which need not be there yet.

    Raises:
        SourceError: an architecture, or a part of one, that is not understood.
        CorruptFileError: tensors that are missing, or of other shapes than the keys give.
    """
    name = header.values.get("general.architecture")
    has_experts = bool(header.values.get(f"{name}.expert_count"))
    model_type = model_type_of(name, has_experts)
    if not model_type:
        message = f"a GGUF file of the architecture {str(name)[:60]!r}, which is not read"
        supported = ", ".join(dict.fromkeys(kind.name for kind in ARCHITECTURES.values()))
        hint = f"Read are {supported}. Merge the model that the file was made of."
        raise SourceError(message, model=label, file=file, hint=hint)
    architecture = ARCHITECTURES[model_type]
    present = {tensor.name: tensor for tensor in header.tensors}
    config, shapes = config_of(header, model_type, label, file)
    expected = _expected(architecture, shapes, present, label, file)
    default_dtype = _default_dtype(header.tensors)
    config["dtype"] = DTYPES[default_dtype][1]
    config |= {key: key in with_bias(architecture, present) for key in architecture.biases if key}
    tensors: dict[str, Tensor] = {}
    for item in expected:
        parts = _parts(present[item.name], len(item.names))
        for new_name, part in zip(item.names, parts, strict=True):
            tensor = _opened(
                part._replace(shape=item.new_shape), new_name, link, label, default_dtype
            )
            heads = {"attn_q": shapes.heads, "attn_k": shapes.kv_heads}.get(_part(item.name))
            if architecture.interleaved and heads:
                tensor = _halves(tensor, heads)
            if architecture.norms_from_one and is_norm(item.name):
                tensor = Shifted(tensor, -1.0)
            tensors[new_name] = tensor
    kinds = Counter(present[item.name].kind.name for item in expected)
    stored_as = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    notes = (f"a GGUF file ({name}); its tensors are read as numbers: {stored_as}",)
    return DecodedModel(tensors, config, notes)


def _parts(tensor: BlockTensor, count: int) -> list[BlockTensor]:
    """The tensors of a stack, or the tensor itself."""
    if count == 1:
        return [tensor]
    nbytes = tensor.nbytes // count
    return [
        tensor._replace(shape=tensor.shape[1:], offset=tensor.offset + number * nbytes)
        for number in range(count)
    ]


def _expected(
    architecture: Architecture,
    shapes: Shapes,
    present: Mapping[str, BlockTensor],
    label: str,
    file: str,
) -> list[Expected]:
    """The file's tensors, and what they become.

    Raises:
        SourceError: tensors that the architecture has not.
        CorruptFileError: tensors that are missing, or of another shape.
    """
    expected = {item.name: item for item in expected_tensors(architecture, shapes, present)}
    where = {"model": label, "file": file}
    unknown = [name for name in present if name not in expected and name != ROPE_FACTORS]
    if unknown:
        message = f"{len(unknown)} tensors that are not understood, among them this one"
        raise SourceError(message, **where, tensor=unknown[0])
    missing = [name for name in expected if name not in present]
    if missing:
        message = f"{len(missing)} tensors are missing, among them this one"
        raise CorruptFileError(message, **where, tensor=missing[0])
    for name, item in expected.items():
        if present[name].shape != item.shape:
            stored = list(present[name].shape)
            message = f"has shape {stored}, and the file's keys say {item.shape}"
            raise CorruptFileError(message, **where, tensor=name)
    return list(expected.values())


def _part(name: str) -> str:
    """What a layer's tensor is, `attn_q`; empty for others."""
    match = _LAYER_NAME.fullmatch(name)
    return match[2] if match else ""


def _default_dtype(tensors: tuple[BlockTensor, ...]) -> str:
    """What the model's weights are: the matrices' dtype, bfloat16 where they are quantised.

    Norms and routers are float32 in every file, whatever the model was.
    """
    matrices = (t for t in tensors if len(t.shape) > 1 and _part(t.name) not in _ROUTERS)
    kinds = {tensor.kind.dtype for tensor in matrices}
    return kinds.pop() if len(kinds) == 1 and "" not in kinds else "BF16"


def _opened(tensor: BlockTensor, name: str, path: Path, label: str, default_dtype: str) -> Tensor:
    """A tensor of the file as it is read."""
    if tensor.kind.dtype == default_dtype:
        return TensorRef(
            name, path, default_dtype, tensor.shape, tensor.offset, tensor.nbytes, label
        )
    raw = TensorRef(name, path, "U8", (tensor.nbytes,), tensor.offset, tensor.nbytes, label)
    return DequantizedBlocks(raw, tensor.kind.number, tensor.shape, default_dtype)


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """The rows of each head from pairs to halves: 0 2 4 ... 1 3 5 ..."""
    import numpy as np

    rows = tensor.shape[0]
    order = np.arange(rows, dtype=np.int64).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return PermutedRows(tensor, (tensor,), SourceRows(np.zeros(rows, np.int32), order, {}))
