"""What a GGUF file says of its model, as Hugging Face has it: names, orders of rows, config.json.

An architecture is understood whole: every tensor of the file has a name and the shape that the
config gives it, none is missing, and what else the config says is either written down or refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merge_cli.checkpoint.dtypes import DTYPES
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.rearranged import PermutedRows, SourceRows
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.gguf.blocks import DequantizedBlocks
from merge_cli.formats.gguf.config import Shapes, config_of
from merge_cli.formats.gguf.header import ROPE_FACTORS, BlockTensor, Header
from merge_cli.formats.storage_format import DecodedModel

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls an architecture, and how its tensors become those of transformers.

    Attributes:
        layer: a layer's tensors, by what follows `blk.N.`.
        biases: the key of config.json that says whether a group of them has biases -> the group.
            The key that is empty is one that config.json lacks: then they are always there.
        interleaved: whether rows of queries and keys are in pairs, as Meta's own code rotates
            them; transformers rotates the first half of a head with the second.
    """

    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        biases={"attention_bias": _ATTENTION, "mlp_bias": _MLP}, interleaved=True
    ),
    "qwen2": Architecture(biases={"": _ATTENTION[:3]}),
    "qwen3": Architecture({**_LAYER, **_HEAD_NORMS}, biases={"attention_bias": _ATTENTION}),
}


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
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        message = f"a GGUF file of the architecture {str(name)[:60]!r}, which is not read"
        hint = f"Read are {', '.join(ARCHITECTURES)}. Merge the model that the file was made of."
        raise SourceError(message, model=label, file=file, hint=hint)
    present = {tensor.name: tensor for tensor in header.tensors}
    config, shapes = config_of(header, str(name), label, file)
    names = _names(architecture, shapes, present, label, file)
    default_dtype = _default_dtype(header.tensors)
    config["dtype"] = DTYPES[default_dtype][1]
    config |= {key: key in _with_bias(architecture, present) for key in architecture.biases if key}
    tensors: dict[str, Tensor] = {}
    for stored_name, new_name in names.items():
        tensor = _opened(present[stored_name], new_name, link, label, default_dtype)
        heads = {"attn_q": shapes.heads, "attn_k": shapes.kv_heads}.get(_part(stored_name))
        if architecture.interleaved and heads:
            tensor = _halves(tensor, heads)
        tensors[new_name] = tensor
    kinds = Counter(present[stored_name].kind.name for stored_name in names)
    stored_as = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    notes = (f"a GGUF file ({name}); its tensors are read as numbers: {stored_as}",)
    return DecodedModel(tensors, config, notes)


def _names(
    architecture: Architecture,
    shapes: Shapes,
    present: Mapping[str, BlockTensor],
    label: str,
    file: str,
) -> dict[str, str]:
    """Each tensor's name in the file -> Hugging Face's.

    Raises:
        SourceError: tensors that the architecture has not.
        CorruptFileError: tensors that are missing, or of another shape.
    """
    expected = dict(expected_tensors(architecture, shapes, present))
    where = {"model": label, "file": file}
    unknown = [name for name in present if name not in expected and name != ROPE_FACTORS]
    if unknown:
        message = f"{len(unknown)} tensors that are not understood, among them this one"
        raise SourceError(message, **where, tensor=unknown[0])
    missing = [name for name in expected if name not in present]
    if missing:
        message = f"{len(missing)} tensors are missing, among them this one"
        raise CorruptFileError(message, **where, tensor=missing[0])
    for name, (_, shape) in expected.items():
        if present[name].shape != shape:
            message = f"has shape {list(present[name].shape)}, and the file's keys say {shape}"
            raise CorruptFileError(message, **where, tensor=name)
    return {name: new_name for name, (new_name, _) in expected.items()}


def expected_tensors(
    architecture: Architecture, shapes: Shapes, present: Container[str]
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Every tensor that a file should have: its name there, then the new name and the shape."""
    for name, new_name in _TOP.items():
        if name != "output" or "output.weight" in present:  # else the head is the embedding
            yield f"{name}.weight", (f"{new_name}.weight", shapes.of(name))
    biased = {name for group in _with_bias(architecture, present).values() for name in group}
    for layer in range(shapes.layers):
        for name, new_name in architecture.layer.items():
            shape = shapes.of(name)
            target = f"model.layers.{layer}.{new_name}"
            yield f"blk.{layer}.{name}.weight", (f"{target}.weight", shape)
            if name in biased:
                yield f"blk.{layer}.{name}.bias", (f"{target}.bias", shape[:1])


def _with_bias(architecture: Architecture, present: Container[str]) -> dict[str, tuple[str, ...]]:
    """The groups that have biases in a file: of a group all do, or none."""
    return {
        key: group
        for key, group in architecture.biases.items()
        if not key or any(f"blk.0.{name}.bias" in present for name in group)
    }


def _part(name: str) -> str:
    """What a layer's tensor is, `attn_q`; empty for others."""
    found = _LAYER_NAME.fullmatch(name)
    return found[2] if found else ""


def _default_dtype(tensors: tuple[BlockTensor, ...]) -> str:
    """What the model's weights are: the matrices' dtype, bfloat16 where they are quantised.

    Norms are float32 in every file, whatever the model was.
    """
    kinds = {tensor.kind.dtype for tensor in tensors if len(tensor.shape) > 1}
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
