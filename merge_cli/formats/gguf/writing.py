"""The way back: a model of transformers as the keys, names and blocks of a GGUF file.

What is written is read again before a byte of it is: the config and the tokenizer that the keys
give must say what the model's own do. A model that the format cannot express is refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.class_config import known_class, quiet_and_alone, without_choices
from merge_cli.checkpoint.rearranged import JoinedTensor, PermutedRows, SourceRows
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import SourceError
from merge_cli.formats.gguf.architectures import (
    ARCHITECTURES,
    Expected,
    Shapes,
    expected_tensors,
    is_norm,
)
from merge_cli.formats.gguf.blocks import BF16, F16, F32, Q8_0, BlockType
from merge_cli.formats.gguf.config import LLAMA3, config_of, llama3_factors
from merge_cli.formats.gguf.header import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    INT32,
    MAGIC,
    ROPE_FACTORS,
    STRING,
    UINT32,
    BlockTensor,
    Header,
    padded,
)
from merge_cli.formats.gguf.model import Shifted

KINDS: dict[str, BlockType] = {"F16": F16, "BF16": BF16, "Q8_0": Q8_0, "F32": F32}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # of `general.file_type`
_USUAL_LOCAL_BASE = 10000.0  # of rotary frequencies in Gemma 3's sliding layers
# Of config.json: what changes nothing that a model says, or what only training uses.
_WITHOUT_EFFECT = frozenset(
    (
        "architectures",
        "attention_dropout",
        "bos_token_id",  # of the tokenizer
        "eos_token_id",
        "dtype",
        "initializer_range",
        "embd_pdrop",
        "max_window_layers",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "_name_or_path",
    )
)


@dataclass(frozen=True)
class Piece:
    """A tensor to write: its name in the file, its blocks, and where its numbers come from."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    tensor: Tensor | None  # None for the factors of rotary frequencies
    numbers: Any = None

    @property
    def nbytes(self) -> int:
        return BlockTensor(self.name, self.kind, self.shape, 0).nbytes


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
    settings = _as_transformers_reads(config, label)
    shapes = _shapes(settings, model_type)
    values = {**_keys(settings, model_type, shapes), **vocabulary}
    values["general.file_type"] = _FILE_TYPES[kind.name]
    expected = _expected(model_type, shapes, tensors, label)
    pieces = [_piece(item, tensors, model_type, shapes, kind) for item in expected]
    _check_config(values, pieces, settings, model_type, label)
    factors = _factors(settings, shapes, label)
    if factors is not None:
        pieces.append(Piece(ROPE_FACTORS, F32, factors.shape, None, factors))
    return GgufPlan(_header(values, pieces), tuple(pieces))


def _as_transformers_reads(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """A config with every default that its class has.

    Raises:
        SourceError: its class refuses it.
    """
    try:
        with quiet_and_alone():
            _, settings = known_class(config)
            return dict(settings.from_dict(without_choices(config)).to_dict())
    except Exception as error:  # a config's own code checks it, with errors of any kind
        message = f"its config cannot be read: {str(error)[:200]}"
        raise SourceError(message, model=label, file="config.json") from None


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of positions, as transformers 5 has them, or 4; of Gemma 3's full layers."""
    if settings.get("rope_parameters"):
        rope = settings["rope_parameters"]
        return dict(rope.get("full_attention", rope))
    scaling = dict(settings.get("rope_scaling") or {})
    return {
        "rope_type": scaling.pop("type", "default"),
        "rope_theta": settings["rope_theta"],
        **scaling,
    }


def _shapes(settings: Mapping[str, Any], model_type: str) -> Shapes:
    heads = settings["num_attention_heads"]
    experts = settings.get("num_local_experts") or settings.get("num_experts") or 0
    return Shapes(
        vocabulary=settings["vocab_size"],
        hidden=settings["hidden_size"],
        layers=settings["num_hidden_layers"],
        mlp=settings["intermediate_size"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head=settings.get("head_dim") or settings["hidden_size"] // heads,
        experts=experts,
        expert_mlp=settings.get("moe_intermediate_size") or settings["intermediate_size"],
        shared_mlp=settings.get("shared_expert_intermediate_size") or 0,
        fused=model_type == "phi3",
    )


def _keys(settings: Mapping[str, Any], model_type: str, shapes: Shapes) -> dict[str, Any]:
    """The keys of a config, in the order in which llama.cpp writes them."""
    rope, architecture = _rope(settings), ARCHITECTURES[model_type]
    about: dict[str, Any] = {
        "vocab_size": shapes.vocabulary,
        "context_length": settings["max_position_embeddings"],
        "embedding_length": shapes.hidden,
        "block_count": shapes.layers,
        "feed_forward_length": shapes.mlp,
        "attention.head_count": shapes.heads,
        "attention.head_count_kv": shapes.kv_heads,
        "attention.layer_norm_rms_epsilon": float(settings["rms_norm_eps"]),
        "attention.key_length": shapes.head,
        "attention.value_length": shapes.head,
        "rope.dimension_count": round(shapes.head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        about["rope.scaling.type"] = rope["rope_type"]
        about["rope.scaling.factor"] = float(rope["factor"])
    if rope.get("original_max_position_embeddings") and rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]
        about["rope.scaling.original_context_length"] = length
    about |= _specific_keys(settings, model_type, shapes)
    named = {f"{architecture.name}.{key}": value for key, value in about.items()}
    return {"general.architecture": architecture.name, "general.type": "model", **named}


def _specific_keys(settings: Mapping[str, Any], model_type: str, shapes: Shapes) -> dict[str, Any]:
    """The keys that not every architecture has."""
    keys: dict[str, Any] = {}
    if ARCHITECTURES[model_type].experts:
        keys = {
            "expert_count": shapes.experts,
            "expert_used_count": settings["num_experts_per_tok"],
        }
    if "moe_intermediate_size" in settings:
        keys["expert_feed_forward_length"] = shapes.expert_mlp
    if shapes.shared_mlp:
        keys["expert_shared_feed_forward_length"] = shapes.shared_mlp
    if "attention.sliding_window" in ARCHITECTURES[model_type].keys and model_type != "llama":
        keys["attention.sliding_window"] = settings.get("sliding_window") or 0
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if settings.get(key) is not None and key in ARCHITECTURES[model_type].keys:
            keys[key] = float(settings[key])
    if model_type == "gemma3_text":
        local = settings.get("rope_parameters", {}).get("sliding_attention", {})
        theta = local.get("rope_theta", settings.get("rope_local_base_freq"))
        if theta != _USUAL_LOCAL_BASE:  # which llama.cpp takes without a key
            keys["rope.freq_base_swa"] = float(theta)
    if model_type == "phi3":
        length = settings["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = length
    return keys


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


def _factors(settings: Mapping[str, Any], shapes: Shapes, label: str) -> Any:
    """The factors of Llama 3.1's rotary frequencies: float32 [head / 2]; None of others.

    Raises:
        SourceError: other numbers than Llama 3.1's, which reading would not find again.
    """
    import numpy as np

    rope = _rope(settings)
    if rope["rope_type"] != "llama3":
        return None
    if any(rope.get(key) != value for key, value in LLAMA3.items()):
        message = "its scaling of positions is not Llama 3.1's, which is all that is written"
        raise SourceError(message, model=label, file="config.json")
    return llama3_factors(shapes.head, rope["rope_theta"], rope["factor"]).astype(np.float32)


def _check_config(
    values: Mapping[str, Any],
    pieces: Sequence[Piece],
    settings: Mapping[str, Any],
    model_type: str,
    label: str,
) -> None:
    """Whether the keys say what the config says.

    Raises:
        SourceError: names a key of config.json that would be lost.
    """
    entries = tuple(BlockTensor(p.name, p.kind, p.shape, 0) for p in pieces)
    header = Header(b"", values, entries)
    config, _ = config_of(header, model_type, label, "model.gguf")
    biases = {key: settings[key] for key in ("attention_bias", "mlp_bias") if key in settings}
    back = _as_transformers_reads({**config, **biases}, label)
    ignored = set(_WITHOUT_EFFECT)
    if _rope(settings)["rope_type"] == "llama3":  # written as a tensor
        ignored |= {"rope_parameters", "rope_scaling"}
    keys = sorted((settings.keys() | back.keys()) - ignored)
    lost = [key for key in keys if settings.get(key) != back.get(key)]
    if lost:
        message = (
            f"GGUF cannot say what its config says of {lost[0]}: {str(settings.get(lost[0]))[:60]}"
        )
        raise SourceError(message, model=label, file="config.json")


def _header(values: Mapping[str, Any], pieces: Sequence[Piece]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(pieces), len(values))]
    for key, value in values.items():
        parts += [_text(key), _value(value)]
    end = 0
    for piece in pieces:
        start = padded(end, DEFAULT_ALIGNMENT)
        parts += [_text(piece.name), struct.pack("<I", len(piece.shape))]
        parts.append(struct.pack(f"<{len(piece.shape)}Q", *reversed(piece.shape)))
        parts.append(struct.pack("<IQ", piece.kind.number, start))
        end = start + piece.nbytes
    raw = b"".join(parts)
    return raw + bytes(padded(len(raw), DEFAULT_ALIGNMENT) - len(raw))


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value[0], str):
        texts = b"".join(map(_text, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + texts
    kind, code = (FLOAT32, "f") if isinstance(value[0], float) else (INT32, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", ARRAY, kind, len(value), *value)


def encode(numbers: Any, kind: BlockType) -> bytes:
    """Numbers as blocks.

    Args:
        numbers: numpy float32, flat, of whole blocks.
    """
    import numpy as np

    if kind is F32:
        return bytes(numbers.tobytes())
    if kind is F16:
        with np.errstate(over="ignore"):  # what is too large is Inf, which the caller refuses
            return bytes(numbers.astype(np.float16).tobytes())
    if kind is BF16:
        bits = numbers.view(np.uint32)
        rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))  # to even
        return bytes((rounded >> 16).astype(np.uint16).tobytes())
    assert kind is Q8_0, "plan_file takes no other"
    blocks = numbers.reshape(-1, kind.elements)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    whole = np.floor(np.abs(scaled))
    codes = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))  # halves go outward
    raw = np.empty((len(blocks), kind.nbytes), np.uint8)
    raw[:, :2] = scale.astype(np.float16).view(np.uint8)
    raw[:, 2:] = codes.astype(np.int8).view(np.uint8)
    return bytes(raw.tobytes())
