"""Tokenizers and chat templates side by side: read as data, never executed.

Rows of an embedding mean tokens by number. Where two models number different tokens alike, their
average is of different things, however well the shapes fit.

Experts are merged by number: whether models number them alike, told by their routers.

A router has a row for each expert. Fine-tunes of one model keep rows near those of the same
number; where a row is nearest to another number's, the experts behind them were probably permuted
or trained apart, and an average by number mixes different things.

What the files beside the weights say, and where models disagree: config.json and dtypes.
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
_MOST = 4096  # experts: a matrix with more rows is no router


@dataclass(frozen=True)
class RouterDifference:
    """A model's routers against the reference's.

    Attributes:
        rows: experts in all routers that were compared.
        elsewhere: of these, rows that are nearest to a row of another number.
        example: a router with the most of them.
    """

    model: str
    rows: int
    elsewhere: int
    example: str


def compare_routers(
    names: Sequence[str], models: Sequence[Mapping[str, Tensor]]
) -> tuple[RouterDifference, ...]:
    """Every model's routers against the first one's; empty for models without experts.

    Args:
        names: of the models.
        models: their tensors; only routers are read.
    """
    with reading() as read:
        routers = [name for name, ref in models[0].items() if _is_router(name, ref)]
        found = []
        for label, tensors in zip(names[1:], models[1:], strict=True):
            counts = list(_elsewhere(routers, models[0], tensors, read))
            if counts:
                rows, away = sum(count[1] for count in counts), sum(count[2] for count in counts)
                worst, *_ = max(counts, key=lambda count: count[2])
                found.append(RouterDifference(label, rows, away, worst))
    return tuple(found)


def _is_router(name: str, ref: Tensor) -> bool:
    shape = ref.shape
    small = len(shape) == 2 and 1 < shape[0] <= min(_MOST, shape[1])
    return small and bool(_ROUTER.search(name)) and ref.dtype in MERGEABLE


def _elsewhere(
    routers: Sequence[str],
    first: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    read: Read,
) -> Iterator[tuple[str, int, int]]:
    """For each router its experts, and how many are nearest to another number."""
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
        away = int((nearest != np.arange(len(nearest))).sum())
        yield name, len(nearest), away


# They say who wrote the file, or how it was loaded, and nothing of the model.
_ASIDE = frozenset(("_name_or_path", "name_or_path", "transformers_version", "use_cache"))
ABSENT = "(absent)"


@dataclass(frozen=True)
class KeyDifference:
    """A key of config.json, dotted where nested, and what each model says, the base first."""

    key: str
    values: tuple[str, ...]


def config_differences(sources: Sequence[Source]) -> tuple[KeyDifference, ...]:
    """Every key on which the configs differ, in alphabetical order.

    Keys that only say who wrote the file are left out. A key that a config lacks is `(absent)`.
    """
    flat = [dict(_flat(source.config)) for source in sources]
    keys = sorted({key for one in flat for key in one})
    found = []
    for key in keys:
        values = tuple(_text(item[key]) if key in item else ABSENT for item in flat)
        if len(set(values)) > 1:
            found.append(KeyDifference(key, values))
    return tuple(found)


def stored_dtypes(sources: Sequence[Source]) -> tuple[dict[str, int], ...]:
    """For each model, how many tensors are stored in each dtype."""
    return tuple(dict(Counter(ref.dtype for ref in s.tensors.values())) for s in sources)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _ASIDE:
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


_EXAMPLES = 5


@dataclass(frozen=True)
class TokenizerDifference:
    """How a model's tokenizer differs from the base's (or the first model's).

    Attributes:
        size, reference_size: tokens; None where unknown.
        missing, added, renumbered: tokens of the reference that it lacks, of its own, and those
            that have another number; `examples` names a few of each, in that order.
        special: for each special token that differs, "theirs -> its own".
        rules: whether anything else that cuts text differs (merges, normalizer, ...).
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
        """Whether anything does."""
        same_template = self.template in ("same", "none")
        return self.tokens_differ or bool(self.special) or self.rules or not same_template


def tokenizer_difference(model: str, reference: Tokenizer, own: Tokenizer) -> TokenizerDifference:
    """Compare one model's tokenizer with the reference's."""
    theirs, ours = reference.vocabulary, own.vocabulary
    comparable = bool(theirs and ours)
    missing = sorted((t for t in theirs if t not in ours), key=theirs.__getitem__)
    added = sorted((t for t in ours if t not in theirs), key=ours.__getitem__)
    moved = sorted((t for t, n in theirs.items() if ours.get(t, n) != n), key=theirs.__getitem__)
    if not comparable:
        missing, added, moved = [], [], []
    names = {*reference.special, *own.special}
    special = {
        name: f"{reference.special.get(name, '(none)')} -> {own.special.get(name, '(none)')}"
        for name in sorted(names)
        if reference.special.get(name) != own.special.get(name)
    }
    return TokenizerDifference(
        model,
        own.size,
        reference.size,
        len(missing),
        len(added),
        len(moved),
        (*missing[:_EXAMPLES], *added[:_EXAMPLES], *moved[:_EXAMPLES]),
        special,
        not (missing or added or moved) and reference.digest != own.digest,
        _compared(reference.template, own.template),
    )


def _compared(theirs: str | None, own: str | None) -> str:
    if theirs == own:
        return "none" if own is None else "same"
    return "added" if theirs is None else "missing" if own is None else "differs"
