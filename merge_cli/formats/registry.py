"""The storage formats that can be read: a new one is a line here."""

from __future__ import annotations

from merge_cli.formats.awq import AWQ
from merge_cli.formats.bitsandbytes import BITSANDBYTES
from merge_cli.formats.compressed_tensors import COMPRESSED_TENSORS
from merge_cli.formats.fp8 import FP8
from merge_cli.formats.gptq import GPTQ
from merge_cli.formats.hqq import HQQ
from merge_cli.formats.mlx import MLX
from merge_cli.formats.mxfp4 import MXFP4
from merge_cli.formats.nvfp4 import NVFP4
from merge_cli.formats.storage_format import StorageFormat

# In the order in which they are tried: those with scales in fp8 before fp8 itself.
FORMATS: tuple[StorageFormat, ...] = (
    COMPRESSED_TENSORS,
    NVFP4,
    FP8,
    MXFP4,
    GPTQ,
    AWQ,
    BITSANDBYTES,
    HQQ,
    MLX,
)
