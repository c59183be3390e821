"""How the names of files end that are models by themselves, besides `.safetensors`."""

from __future__ import annotations

GGUF = ".gguf"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # what `torch.save` has written
