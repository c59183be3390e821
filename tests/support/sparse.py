"""Checkpoints that are larger than the disk: files with holes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.support.dam_tiny import write_tokenizer


def write_sparse(folder: Path, of: Any) -> Path:
    """A model whose header is real and whose weights are a hole."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        net = hf.AutoModelForCausalLM.from_config(of)
    header, offset = {}, 0
    for name, value in net.named_parameters():
        size = 4 * value.numel()
        about = {"dtype": "F32", "shape": list(value.shape)}
        header[name] = {**about, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    about = of.to_dict() | {"architectures": [type(net).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(about))
    write_tokenizer(folder)
    return folder
