"""mergekit-yaml's flags, each honoured or answered in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping

from merge_cli.errors import UsageError
from merge_cli.sizes import parse_size, show_size

# Given by a user of mergekit, not needed here: flag -> why.
NOT_NEEDED = {
    "lazy_unpickle": "only safetensors is read, and always lazily",
    "low_cpu_memory": "memory is always bounded; see --max-memory",
    "read_to_gpu": "tensors go to the device of --device anyway",
    "async_write": "writing always overlaps with computing",
    "clone_tensors": "a layer may occur as often as the recipe says",
    "safe_serialization": "only safetensors is written",
    "multi_gpu": "one device is used; the result would be the same",
    "allow_crimes": "architectures are not compared; tensors are matched by name and shape",
    "write_model_card": "the model card is always written",
    "unsafe_truncate_embeddings": "vocabularies of different sizes are refused, not cut",
    "write_threads": "one thread writes as fast as the disk",
    "transformers_cache": "set HF_HOME or HF_HUB_CACHE, which every Hub tool honours",
    "lora_merge_cache": "no merged adapter is ever stored",
    "lora_merge_dtype": "computing is float32",
    "verbose": "progress and decisions are always shown; see --quiet",
}
_COUNTED = re.compile(r"(\d+(?:\.\d+)?)\s*([kmb])", flags=re.IGNORECASE)


def answers(given: Mapping[str, object]) -> list[str]:
    """One line for each flag that was given and is not needed."""
    return [
        f"--{name.replace('_', '-')} is not needed: {why}."
        for name, why in NOT_NEEDED.items()
        if given.get(name)
    ]


def shard_bytes(text: str) -> tuple[int, str]:
    """--out-shard-size in bytes, and a line on how it was read.

    mergekit counts parameters (5B); bytes (5GB) are understood, too.

    Raises:
        UsageError: neither.
    """
    counted = _COUNTED.fullmatch(text.strip())
    if not counted:
        return parse_size(text, "--out-shard-size"), ""
    count = float(counted[1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[counted[2].lower()]
    size = int(count * 2)
    if not size:
        raise UsageError(f"--out-shard-size: '{text}' is too small")
    return size, f"--out-shard-size {text} counts parameters: shards of {show_size(size)}."
