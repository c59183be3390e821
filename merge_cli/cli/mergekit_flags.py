"""mergekit-yaml's flags and their negative forms: each works, or a line says why it does not."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_cli.errors import UsageError
from merge_cli.system.machine import parse_size, show_size

if TYPE_CHECKING:
    from merge_cli.recipe.schema import Recipe

# Flags without effect: flag -> why it has none, and why its negative form has none.
_LAZY = "only safetensors is read, and always lazily"
_MEMORY = "memory is bounded, whatever the device; see --max-memory"
_OVERLAP = "writing always overlaps with computing; the bytes are the same"
_CLONES = "a layer may occur as often as the recipe says, and is written each time"
_CRIMES = "architectures are not compared; tensors must fit by name and shape"
NO_EFFECT: dict[str, tuple[str, str]] = {
    "lazy_unpickle": (_LAZY, _LAZY),
    "low_cpu_memory": (_MEMORY, _MEMORY),
    "read_to_gpu": (
        "every block goes to the device of --device, through memory of the host",
        "every block passes through memory of the host anyway",
    ),
    "async_write": (_OVERLAP, _OVERLAP),
    "clone_tensors": (_CLONES, _CLONES),
    "safe_serialization": (
        "only safetensors is written",
        "only safetensors is written; nothing is pickled",
    ),
    "multi_gpu": (
        "every GPU that is visible is used anyway; see --device cuda:N for one",
        "every GPU that is visible is used; --device cuda:N, or CUDA_VISIBLE_DEVICES, takes one",
    ),
    "allow_crimes": (_CRIMES, _CRIMES),
    "lora_merge_cache": ("no merged adapter is ever stored", ""),
    "lora_merge_dtype": ("adapters are added in float32", ""),
    "write_threads": ("each thread that merges writes its own results; see --threads", ""),
    "verbose": ("progress and decisions are always shown; see --quiet", ""),
}
_SPELLED = {"verbose": "-v"}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmb])", flags=re.IGNORECASE)


def answers(flags: Mapping[str, object]) -> list[str]:
    """A line for each given flag without effect.

    Args:
        flags: flag -> its value; None where it was not given, False for its negative form.
    """
    lines = []
    for name, (positive, negative) in NO_EFFECT.items():
        value = flags.get(name)
        if value is None or (not value and not negative):
            continue
        flag = _SPELLED.get(name, f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
        lines.append(f"{flag} has no effect: {negative if value is False else positive}.")
    return lines


def device_of(device: str, cuda: bool | None, gpu_rich: bool | None, multi_gpu: bool | None) -> str:
    """The device that the flags choose together; `--device` overrides `--no-cuda`.

    Raises:
        UsageError: they contradict each other.
    """
    requested = bool(cuda or gpu_rich)
    if requested and device not in ("auto", "cuda"):
        flag = "--cuda" if cuda else "--gpu-rich"
        raise UsageError(f"{flag} and --device {device} contradict each other")
    if requested:
        device = "cuda"
    elif cuda is False and device == "auto":
        device = "cpu"
    return "cuda:0" if multi_gpu is False and device == "cuda" else device


def use_cache(folder: str) -> None:
    """Use a folder for downloads, as `HF_HUB_CACHE` does."""
    cache_path = str(Path(folder).expanduser().absolute())
    os.environ["HF_HUB_CACHE"] = cache_path
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the environment already
        constants.HF_HUB_CACHE = cache_path  # type: ignore[attr-defined]  # a module, of strings


def truncating(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with its models cut to the rows of the smallest one.

    As in mergekit, a tokenizer section overrides the flag.
    """
    from merge_cli.recipe.tokenizer import TokenizerSpec

    if recipe.tokenizer is not None:
        reason = "the recipe says how vocabularies are brought together"
        return recipe, [f"--unsafe-truncate-embeddings has no effect: {reason}."]
    stages = tuple(truncating(stage)[0] for stage in recipe.stages)
    sweep = {name: truncating(variant)[0] for name, variant in recipe.sweep.items()}
    spec = TokenizerSpec(key="tokenizer", truncate=True)
    return replace(recipe, tokenizer=spec, stages=stages, sweep=sweep), []


def shard_bytes(text: str) -> tuple[int, str]:
    """--out-shard-size in bytes, and a note on how it was read.

    mergekit's help calls 5B a number of parameters; mergekit counts bytes.

    Raises:
        UsageError: not a size.
    """
    match = _BYTES.fullmatch(text.strip())
    if not match:
        return parse_size(text, "--out-shard-size"), ""
    size = int(float(match[1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()])
    if not size:
        raise UsageError(f"--out-shard-size: '{text}' is too small")
    return size, f"--out-shard-size {text} is read as mergekit does: {show_size(size)} of bytes."
