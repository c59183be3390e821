"""Tokenizers and chat templates side by side: read as data, never executed.

Rows of an embedding mean tokens by number. Where two models number different tokens alike, their
average is of different things, however well the shapes fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge_cli.checkpoint.tokenizer_files import Tokenizer

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
