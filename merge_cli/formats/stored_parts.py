"""The stored parts of a quantised weight: found, and held against one another.

Whatever is no part of a weight must be known, too: scales of activations are left out, and codes
that belong to nothing are refused, since they would be merged as if they were numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor, reading
from merge_cli.errors import CorruptFileError, SourceError

_SMALL = 64  # numbers that are read while a model is opened
_TEXT = 10_000  # bytes of a text that is


def corrupt(message: str, ref: TensorRef) -> CorruptFileError:
    """The error for a stored tensor."""
    return CorruptFileError(message, model=ref.model, file=ref.path.name, tensor=ref.name)


def required(tensors: Mapping[str, TensorRef], name: str, ref: TensorRef) -> TensorRef:
    """The tensor of a name, which `ref` cannot be read without.

    Raises:
        CorruptFileError: there is none.
    """
    if name not in tensors:
        raise corrupt(f"cannot be read without '{name}', which is not there", ref)
    return tensors[name]


def of_shape(
    ref: TensorRef, dtypes: Collection[str], *shapes: tuple[int, ...], why: str
) -> TensorRef:
    """The tensor itself, if it has one of the dtypes and of the shapes.

    Args:
        why: what it must fit, for the message.

    Raises:
        CorruptFileError: it does not.
    """
    if ref.dtype in dtypes and ref.shape in shapes:
        return ref
    allowed = " or ".join(str(list(shape)) for shape in shapes)
    names = ", ".join(sorted(dtypes))
    message = (
        f"{ref.dtype} of shape {list(ref.shape)} does not fit {why}: {names} of {allowed} does"
    )
    raise corrupt(message, ref)


# Of activations and of the key-value cache: of no use without arithmetic in few bits.
_ACTIVATIONS = (
    ".input_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".activation_scale",
    ".input_scale_ub",
    ".input_global_scale",
    ".input_zero_point",
    ".output_zero_point",
    ".scale_input",
)
_CODES = ("U8", "I8", "U32", "F8_E4M3", "F8_E5M2", "F8_E8M0")
# Integers that codes are stored in, and how the names of scales end that stand beside them.
_INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32")
_SCALES = ("scale", "scales", "scale_inv", "absmax", "scb")


def is_activation(name: str) -> bool:
    """Whether a tensor's name is that of a scale of activations or caches."""
    return name.endswith(_ACTIVATIONS)


def drop_activations(tensors: dict[str, Tensor]) -> list[str]:
    """Take the scales of activations and caches out, and say so."""
    dropped = [name for name in tensors if is_activation(name)]
    for name in dropped:
        del tensors[name]
    if not dropped:
        return []
    return [f"{len(dropped)} scales of activations and caches are left out ({dropped[0]}, ...)"]


def reject_leftovers(tensors: Iterable[Tensor], endings: tuple[str, ...]) -> None:
    """No tensor of a format may be left over: it would be merged as if it were a weight.

    Args:
        endings: of names that the format alone gives.

    Raises:
        CorruptFileError: names the first one.
    """
    for tensor in tensors:
        if not isinstance(tensor, TensorRef):
            continue
        if tensor.name.endswith(endings) or tensor.dtype in _CODES:
            raise corrupt(f"belongs to no weight that is read here ({tensor.dtype})", tensor)


def reject_codes(tensors: Mapping[str, TensorRef], label: str) -> None:
    """A model that says nothing of codes may hold none: integers beside scales.

    Raises:
        SourceError: names the first one.
    """
    codes = [n for n, ref in tensors.items() if ref.dtype in _INTEGERS and len(ref.shape) > 1]
    if not codes:
        return
    scales = {_module(name): name for name in tensors if name.lower().endswith(_SCALES)}
    for name in codes:
        scale = scales.get(name) or (_module(name) and scales.get(_module(name)))
        if scale:
            message = f"holds the codes of a quantised weight ({scale} stands beside it)"
            hint = (
                "config.json does not say how to read them: it lacks `quantization_config`. Some "
                "tools write it into quantize_config.json or quant_config.json: copy it from there."
            )
            raise SourceError(message, model=label, tensor=name, hint=hint)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def small_numbers(ref: TensorRef) -> list[int] | None:
    """A short tensor of integers, read at once; None where its file is still to be fetched.

    Raises:
        CorruptFileError: it cannot be read, or is none.
    """
    if ref.dtype not in ("I32", "I64") or ref.size > _SMALL:
        raise corrupt(f"{ref.dtype} of shape {list(ref.shape)}: not a few whole numbers", ref)
    if not ref.path.exists():
        return None
    with reading() as read:
        return [int(number) for number in read_integers(read, ref, 0, ref.size)]


def not_here(ref: TensorRef) -> SourceError:
    """The error for a model whose headers do not say what its weights are."""
    message = "the shapes of its weights are inside its files, which are not here yet"
    hint = "Download it (`hf download NAME --local-dir FOLDER`), and name the folder."
    return SourceError(message, model=ref.model, hint=hint)


def small_bytes(ref: TensorRef) -> bytes | None:
    """The bytes of a short tensor, read at once; None where its file is still to be fetched.

    Raises:
        CorruptFileError: it cannot be read, or is not short.
    """
    if ref.nbytes > _TEXT:
        raise corrupt(f"{ref.nbytes} bytes: no more than {_TEXT} are read here", ref)
    if not ref.path.exists():
        return None
    raw = bytearray(ref.nbytes)
    with reading() as read:
        read(ref, 0, memoryview(raw))
    return bytes(raw)


def as_bytes(ref: TensorRef) -> TensorRef:
    """The same bytes, whatever dtype a library keeps its codes in."""
    return ref._replace(dtype="U8", shape=(ref.nbytes,))


def read_integers(read: Read, ref: TensorRef, start: int, count: int) -> Any:
    """Whole numbers [start, start + count) of a tensor of any integer dtype: numpy, flat."""
    import numpy as np

    kinds = {"I8": np.int8, "U8": np.uint8, "I32": np.int32, "U32": np.uint32, "I64": np.int64}
    numbers = np.empty(count, kinds[ref.dtype])
    if count:
        read(ref, start, numbers.view(np.uint8).data)
    return numbers
