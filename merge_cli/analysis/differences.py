"""Differences between models besides their weights: routers, configs, dtypes, tokenizers.

Rows of an embedding mean tokens by number, and experts are merged by number. Where two models give
one number to different tokens or experts, their average mixes different things, however well the
shapes fit. A router has a row for each expert, and fine-tunes of one model keep rows near those of
the same number; where a row is nearest to another number's, the experts were probably permuted or
trained apart. Files are read as data, and nothing in them is executed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.dtypes import MERGEABLE
from merge_cli.checkpoint.tensors import Read, Tensor, read_numbers, reading
from merge_cli.sources.source import Source
from merge_cli.tokenizer.files import Tokenizer

# `mlp.gate.weight`, `block_sparse_moe.gate.weight`, `mlp.router.weight`: and not `gate_proj`.
_ROUTER = re.compile(r"(^|\.)(gate|router|router\.layer|gate\.wg|router\.classifier)\.weight$")
_MAX_EXPERTS = 4096
# They say who wrote the file, or how it was loaded, and nothing about the model.
_IGNORED_KEYS = frozenset(("_name_or_path", "name_or_path", "transformers_version", "use_cache"))
ABSENT = "(absent)"
_EXAMPLES = 5


@dataclass(frozen=True)
class RouterDifference:
    """A model's routers, compared with the reference's.

    Attributes:
        rows: experts in all routers that were compared.
        moved: rows that are nearest to a row of another number.
        example: the router with most of those.
    """

    model: str
    rows: int
    moved: int
    example: str


def compare_routers(
    names: Sequence[str], models: Sequence[Mapping[str, Tensor]]
) -> tuple[RouterDifference, ...]:
    """Compare every model's routers with the first one's; empty for models without experts.

    Args:
        names: of the models.
        models: their tensors; only routers are read.
    """
    with reading() as read:
        routers = [name for name, ref in models[0].items() if _is_router(name, ref)]
        differences = []
        for label, tensors in zip(names[1:], models[1:], strict=True):
            counts = list(_moved_rows(routers, models[0], tensors, read))
            if counts:
                rows, moved = sum(count[1] for count in counts), sum(count[2] for count in counts)
                worst, *_ = max(counts, key=lambda count: count[2])
                differences.append(RouterDifference(label, rows, moved, worst))
    return tuple(differences)


def _is_router(name: str, ref: Tensor) -> bool:
    shape = ref.shape
    small = len(shape) == 2 and 1 < shape[0] <= min(_MAX_EXPERTS, shape[1])
    return small and bool(_ROUTER.search(name)) and ref.dtype in MERGEABLE


def _moved_rows(
    routers: Sequence[str],
    first: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    read: Read,
) -> Iterator[tuple[str, int, int]]:
    """For each router its number of experts, and how many are nearest to another number."""
    import numpy as np

    for name in routers:
        if name not in other or other[name].shape != first[name].shape:
            continue
        rows = []
        for tensor in (first[name], other[name]):
            values = read_numbers(read, tensor, 0, tensor.size).reshape(tensor.shape)
            values = values.astype(np.float64)
            lengths = np.linalg.norm(values, axis=1, keepdims=True)
            rows.append(values / np.where(lengths > 0, lengths, 1.0))
        nearest = (rows[1] @ rows[0].T).argmax(1)
        moved = int((nearest != np.arange(len(nearest))).sum())
        yield name, len(nearest), moved


@dataclass(frozen=True)
class KeyDifference:
    """A key of config.json, dotted where nested, and each model's value, the base first."""

    key: str
    values: tuple[str, ...]


def config_differences(sources: Sequence[Source]) -> tuple[KeyDifference, ...]:
    """Every key on which the configs differ, in alphabetical order.

    Keys about the writer of the file are left out. A key that a config lacks is `(absent)`.
    """
    flat = [dict(_flat(source.config)) for source in sources]
    keys = sorted({key for config in flat for key in config})
    differences = []
    for key in keys:
        values = tuple(_text(config[key]) if key in config else ABSENT for config in flat)
        if len(set(values)) > 1:
            differences.append(KeyDifference(key, values))
    return tuple(differences)


def stored_dtypes(sources: Sequence[Source]) -> tuple[dict[str, int], ...]:
    """For each model, how many tensors are stored in each dtype."""
    return tuple(dict(Counter(ref.dtype for ref in s.tensors.values())) for s in sources)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _IGNORED_KEYS:
            continue
        # transformers 5 writes `dtype`, older files say `torch_dtype`.
        name = prefix + ("dtype" if key == "torch_dtype" else str(key))
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _text(value: Any, most: int = 60) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return text if len(text) <= most else f"{text[: most - 1]}…"


@dataclass(frozen=True)
class TokenizerDifference:
    """How a model's tokenizer differs from the base's (or the first model's).

    Attributes:
        size, reference_size: tokens; None where unknown.
        missing, added, renumbered: tokens that only the reference has, that only the model has,
            and that have another number; `examples` names a few of each, in that order.
        special: for each special token that differs, "the reference's -> the model's".
        rules: whether anything else that splits text differs (merges, normalizer, ...).
        template: `same`, `differs`, `added`, `missing` or `none` (neither has one).
    """

    model: str
    size: int | None
    reference_size: int | None
    missing: int
    added: int
    renumbered: int
    examples: tuple[str, ...]
    special: Mapping[str, str]
    rules: bool
    template: str

    @property
    def tokens_differ(self) -> bool:
        """Whether a token number may mean different tokens."""
        return bool(self.missing or self.added or self.renumbered)

    @property
    def differs(self) -> bool:
        """Whether anything differs."""
        same_template = self.template in ("same", "none")
        return self.tokens_differ or bool(self.special) or self.rules or not same_template

    def in_words(self) -> list[str]:
        """The differences besides the number of tokens."""
        words = [f"{name}: {change}" for name, change in self.special.items()]
        if self.rules:
            words.append("text is split by other rules (merges, normalizer, or added tokens)")
        if self.template not in ("same", "none"):
            words.append(f"chat template {self.template}")
        return words


def tokenizer_difference(
    model: str, reference: Tokenizer, tokenizer: Tokenizer
) -> TokenizerDifference:
    """Compare one model's tokenizer with the reference's."""
    reference_tokens, tokens = reference.vocabulary, tokenizer.vocabulary
    comparable = bool(reference_tokens and tokens)
    missing = sorted(
        (t for t in reference_tokens if t not in tokens), key=reference_tokens.__getitem__
    )
    added = sorted((t for t in tokens if t not in reference_tokens), key=tokens.__getitem__)
    renumbered = sorted(
        (t for t, n in reference_tokens.items() if tokens.get(t, n) != n),
        key=reference_tokens.__getitem__,
    )
    if not comparable:
        missing, added, renumbered = [], [], []
    names = {*reference.special, *tokenizer.special}
    special = {
        name: f"{reference.special.get(name, '(none)')} -> {tokenizer.special.get(name, '(none)')}"
        for name in sorted(names)
        if reference.special.get(name) != tokenizer.special.get(name)
    }
    return TokenizerDifference(
        model,
        tokenizer.size,
        reference.size,
        len(missing),
        len(added),
        len(renumbered),
        (*missing[:_EXAMPLES], *added[:_EXAMPLES], *renumbered[:_EXAMPLES]),
        special,
        not (missing or added or renumbered) and reference.fingerprint != tokenizer.fingerprint,
        _template_difference(reference.template, tokenizer.template),
    )


def _template_difference(reference: str | None, template: str | None) -> str:
    if reference == template:
        return "none" if template is None else "same"
    return "added" if reference is None else "missing" if template is None else "differs"
