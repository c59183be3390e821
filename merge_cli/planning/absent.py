"""Tensors that not every source has: copied from the reference, left out, or an error.

A tensor of the reference that a source lacks is copied from the reference, with a note in the plan,
in these cases, where the copy makes nothing up:

- buffers that models compute by themselves;
- layers for multi-token prediction (MTP), which transformers neither loads nor saves: the config
  counts them, their names say so, or the class skips them on loading;
- what the class of the reference, or of the source, says that a file may be without;
- poolers and next-sentence heads, which a class may be built without (bert-base-uncased has them,
  its fine-tunes for masked words do not);
- a part of the reference (its vision tower) that the source's config does not describe, and of
  which the source has no tensor at all.

Anything else that is missing is an error. What a source has and the reference lacks is left out,
again with a note, in the first four cases; otherwise it is an error, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merge_cli.checkpoint.config import layer_count, text_config
from merge_cli.planning.layers import TEXT, kind_of, layer_key_of
from merge_cli.planning.skeleton import class_rules
from merge_cli.sources.source import Source

# Buffers that old checkpoints stored and models compute by themselves.
BUFFERS = (
    "rotary_emb.inv_freq",
    ".masked_bias",
    ".attn.bias",
    ".attention.bias",
    "position_ids",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
BUFFER = "the model computes this buffer by itself"
_POOLER = re.compile(r"(^|\.)pooler\.")
_PAIRS = re.compile(r"(^|\.)cls\.seq_relationship\.")
_MTP = re.compile(r"(^|\.)mtp(_[a-z]+)?\.")
_MTP_KEY = re.compile(r"(^|_)(mtp|nextn)(_|$)")
# A part of a model is described under a key of its own; these describe no part.
_NO_PARTS = ("text_config", "llm_config", "quantization_config", "generation_config")
# What belongs to the language model, however it is called inside a larger one.
_OWN = re.compile(r"(^|\.)(embed|norm|ln_f|final_norm|lm_head|wte|wpe|score|classifier)")


class AbsentTensors:
    """Why sources may lack tensors.

    Args:
        sources: with the reference's names.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._folders: dict[int, frozenset[str]] = {}
        self._text_alone: dict[int, bool] = {}

    def why_copied(
        self, name: str, reference: int, lacking: Iterable[int], *, sliced: bool = False
    ) -> str:
        """Why sources may lack a tensor of the reference; empty where one may not.

        Args:
            sliced: whether the name's layer is counted in the output, not in the model.
        """
        lacking = tuple(lacking)
        why = self.by_config(name, reference, lacking, sliced=sliced)
        return why or self._by_class(name, (reference, *lacking))

    def by_config(
        self, name: str, reference: int, lacking: Iterable[int], *, sliced: bool = False
    ) -> str:
        """`why_copied`, as far as that is known without the models' classes."""
        why = self._by_name(name, reference, sliced=sliced)
        if not why and all(self._without_part(name, reference, item) for item in lacking):
            why = "a part that the config does not describe"
        return why

    def why_left_out(self, name: str, reference: int, source: int, *, sliced: bool = False) -> str:
        """Why the reference may lack a tensor of a source; empty where it may not."""
        both = (reference, source)
        why = (self._by_name(name, item, sliced=sliced) for item in both)
        return next(filter(None, why), "") or self._by_class(name, both)

    def _by_name(self, name: str, described_by: int, *, sliced: bool) -> str:
        if name.endswith(BUFFERS):
            return BUFFER
        if _POOLER.search(name):
            return "models are built with and without a pooler"
        if _PAIRS.search(name):
            return "models are built with and without a head for pairs of sentences"
        config = self._sources[described_by].config
        key = mtp_key(config)
        if key and (_MTP.search(name) or not sliced and is_beyond(name, config)):
            return f"layers for predicting several tokens ({key}), which transformers does not save"
        return ""

    def _by_class(self, name: str, sources: Iterable[int]) -> str:
        configs = [self._sources[source].config for source in sources]
        for config in configs:
            if class_rules(config).may_lack(name):
                return f"{config['architectures'][0]} in transformers may be without it"
        return ""

    def _without_part(self, name: str, reference: int, source: int) -> bool:
        """Whether a tensor belongs to a part that a source is without, by its config and names."""
        config, source_config = self._sources[reference].config, self._sources[source].config
        if any(
            key in source_config for key in (*parts_of(config), "vision_config", "audio_config")
        ):
            return False  # it is described, so that it should be there
        if kind_of(name) != TEXT:
            if source not in self._text_alone:
                names = self._sources[source].tensors
                self._text_alone[source] = all(kind_of(other) == TEXT for other in names)
            return self._text_alone[source]
        if not parts_of(config):
            return False
        if source not in self._folders:
            self._folders[source] = _folders(self._sources[source].tensors)
        folders = self._folders[source]
        *parents, _ = name.split(".")
        for depth, part in enumerate(parents, start=1):
            if part.isdigit():
                return False  # a layer of what the source has
            if ".".join(parents[:depth]) not in folders:
                return _OWN.match(part) is None
        return False


def parts_of(config: Mapping[str, Any]) -> list[str]:
    """The keys under which a config describes parts of a model besides its language model."""
    return [
        key
        for key, value in config.items()
        if isinstance(value, dict) and key.endswith("_config") and key not in _NO_PARTS
    ]


def mtp_key(config: Mapping[str, Any]) -> str:
    """The key by which a config says that there are layers for predicting several tokens."""
    for config_part in (config, text_config(config)):
        for key, value in config_part.items():
            if _MTP_KEY.search(key) and isinstance(value, int) and value > 0:
                return f"{key}: {value}" if type(value) is int else key
    return ""


def is_beyond(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a layer behind the language model's last."""
    key, count = layer_key_of(name), layer_count(config)
    return (
        key is not None
        and count is not None
        and kind_of(name) == TEXT
        and (key.number >= count and not config.get("is_encoder_decoder"))
    )


def in_short(names: Sequence[str]) -> str:
    """Names in a line: what they have in common, or the first and how many more."""
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix([name.split(".") for name in names])
    if common:
        return f"{'.'.join(common)}.* ({len(names)} tensors)"
    return f"{names[0]} and {len(names) - 1} more"


def _folders(names: Iterable[str]) -> frozenset[str]:
    """Everything that stands before a dot in some name."""
    result: set[str] = set()
    for name in names:
        folder = name.rpartition(".")[0]
        while folder and folder not in result:
            result.add(folder)
            folder = folder.rpartition(".")[0]
    return frozenset(result)
