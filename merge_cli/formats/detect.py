"""Quantised checkpoints: fp8 with its scales is read as numbers, everything else refused by name.

Scales as DeepSeek, Qwen and transformers write them (`weight_scale_inv`, blocks of 128 x 128), and
as compressed-tensors, FBGEMM and ModelOpt do (`weight_scale`: of the tensor, a row, or a block).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.errors import CorruptFileError
from merge_cli.formats.fp8 import DequantizedTensor

KEY = "quantization_config"
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")  # behind the weight's name
# Of activations and of the key-value cache: of no use without fp8 arithmetic.
_DROPPED = (
    ".input_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".activation_scale",
    ".input_scale_ub",
)
ADVICE = {
    "gptq": "Merge the unquantised models, then quantise the result (GPTQModel).",
    "awq": "Merge the unquantised models, then quantise the result (AutoAWQ, llm-compressor).",
    "bitsandbytes": "Load it with transformers, call `dequantize()`, save it, and merge that; or "
    "merge the unquantised models and load the result with `load_in_4bit`.",
    "hqq": "Merge the unquantised models; HQQ quantises while loading.",
    "mxfp4": "Load it with Mxfp4Config(dequantize=True), save it, and merge that.",
    "gguf": "Merge the model that the GGUF file was made of, and convert the result.",
}
_ALWAYS = "Merge the unquantised models, then quantise the result."
Tensors = Mapping[str, TensorRef]


def advice(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """How a model is quantised that cannot be read, and what to do; None for one that can."""
    quantization = config.get(KEY)
    if not quantization:
        return None
    method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
    name = str(method or "quantization_config in config.json")
    return name, ADVICE.get(str(method).lower(), _ALWAYS)


def read_as_numbers(
    tensors: Tensors, config: Mapping[str, Any], label: str
) -> tuple[dict[str, TensorRef | DequantizedTensor], dict[str, Any], tuple[str, ...]]:
    """A model's tensors with fp8 weights as numbers, its config without that, and what was done.

    A model without fp8 weights comes back as it is.

    Raises:
        CorruptFileError: scales that do not fit their weight.
    """
    quantization = config.get(KEY)
    plain = dict(config)
    stored = [ref for ref in tensors.values() if ref.dtype in _FP8]
    if not stored or not _is_fp8(quantization):
        return dict(tensors), plain, ()
    default_dtype = {"float16": "F16", "float32": "F32"}.get(
        str(config.get("dtype") or config.get("torch_dtype")), "BF16"
    )
    as_numbers: dict[str, TensorRef | DequantizedTensor] = dict(tensors)
    scaled = 0
    for ref in stored:
        scale = next(
            (tensors[ref.name + end] for end in _SCALES if ref.name + end in tensors), None
        )
        if scale is not None:
            del as_numbers[scale.name]
            scaled += 1
        as_numbers[ref.name] = DequantizedTensor(
            ref, scale, _block(ref, scale, quantization, label), default_dtype
        )
    dropped = [name for name in as_numbers if name.endswith(_DROPPED)]
    for name in dropped:
        del as_numbers[name]
    plain.pop(KEY, None)
    notes = [f"{len(stored)} fp8 weights are read as numbers, {scaled} of them with scales"]
    if dropped:
        notes.append(
            f"{len(dropped)} scales of activations and caches are left out ({dropped[0]}, ...)"
        )
    return as_numbers, plain, tuple(notes)


def _is_fp8(quantization: Any) -> bool:
    """Whether what a config says of its quantisation is fp8 and nothing else."""
    if not isinstance(quantization, dict):
        return quantization is None
    method = str(quantization.get("quant_method", "")).lower()
    if method in ("fp8", "fbgemm_fp8"):
        return bool(quantization.get("expert_dtype", "fp8") == "fp8")
    if method == "modelopt":
        return "FP8" in str(quantization.get("quant_algo", quantization))
    if method == "compressed-tensors":
        return all(
            weights.get("num_bits") == 8 and weights.get("type") == "float"
            for weights in _weights(quantization)
        )
    return False


def _weights(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for group in (quantization.get("config_groups") or {}).values():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            yield group["weights"]


def _block(
    ref: TensorRef, scale: TensorRef | None, quantization: Any, label: str
) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = ref.shape[-2:] if len(ref.shape) > 1 else (1, *(ref.shape or (1,)))
    if scale is None or scale.size == 1:
        return rows, columns
    grid = scale.shape[-2:] if len(scale.shape) > 1 else (scale.shape[0], 1)
    stacked = ref.size // max(1, rows * columns)
    declared = _told_block(quantization)
    # Without a word on it, blocks divide the weight evenly; a scale for each row always may be.
    even = rows % grid[0] == 0 and columns % grid[1] == 0
    derived = (rows // grid[0], columns // grid[1]) if even else None
    for block in (declared, derived):
        fits = block and (-(-rows // block[0]), -(-columns // block[1])) == tuple(grid)
        if block and fits and scale.size == stacked * grid[0] * grid[1]:
            return block
    message = f"scales of shape {list(scale.shape)} do not fit a weight of shape {list(ref.shape)}"
    raise CorruptFileError(message, model=label, file=scale.path.name, tensor=scale.name)


def _told_block(quantization: Any) -> tuple[int, int] | None:
    """What the config says, if it does."""
    if not isinstance(quantization, dict):
        return None
    shapes = [
        quantization.get("weight_block_size"),
        *(k.get("block_structure") for k in _weights(quantization)),
    ]
    for size in shapes:
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n for n in size):
            return size[0], size[1]
    return None
