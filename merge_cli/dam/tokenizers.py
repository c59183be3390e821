"""One tokenizer for all sources: predictions of other tokens cannot be compared."""

from __future__ import annotations

import json
from typing import Any

from merge_cli.engine.plan import Plan
from merge_cli.errors import MismatchError, Problem
from merge_cli.evaluation.digest import auxiliary_fingerprint
from merge_cli.evaluation.tokenizer import load_tokenizer

# What a text becomes; padding and truncation are the caller's business, and decoding is not asked.
_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens")


def one_tokenizer(plan: Plan) -> tuple[Any, str]:
    """The tokenizer that all sources share, and what to know of its chat template, if anything.

    Raises:
        SourceError: one cannot be loaded.
        MismatchError: they differ, with what differs.
    """
    first = plan.sources[plan.operands[0]]
    tokenizer, digest = load_tokenizer(first), auxiliary_fingerprint(first.root)
    problems, other_templates = [], []
    for i in plan.operands[1:]:
        source = plan.sources[i]
        if auxiliary_fingerprint(source.root) == digest:
            continue
        other = load_tokenizer(source)
        what = _difference(tokenizer, other)
        if what:
            problems.append(
                Problem(f"has another tokenizer than {first.label}: {what}", source.label)
            )
        elif other.chat_template != tokenizer.chat_template:
            other_templates.append(source.label)
    if problems:
        what = "the sources' tokenizers differ: their predictions cannot be compared"
        raise MismatchError(problems, what)
    if not other_templates:
        return tokenizer, ""
    return tokenizer, f"{first.label}'s, for all data; {', '.join(other_templates)} has another"


def _difference(one: Any, other: Any) -> str:
    """What makes other tokens of a text; empty where nothing does."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    if ours != theirs:
        moved = sum(theirs.get(token) != number for token, number in ours.items())
        return f"{len(theirs):,} entries against {len(ours):,}, {moved:,} of them elsewhere"
    for part, parts in zip(_PARTS, zip(_parts(one), _parts(other), strict=True), strict=True):
        if parts[0] != parts[1]:
            return f"the same entries, and another {part}"
    if one.bos_token_id != other.bos_token_id:
        return f"a text begins with {other.bos_token!r} instead of {one.bos_token!r}"
    return ""


def _parts(tokenizer: Any) -> list[Any]:
    """The steps of a fast tokenizer; of a slow one its vocabulary is all that can be compared."""
    if not tokenizer.is_fast:
        return [None] * len(_PARTS)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return [whole[part] for part in _PARTS]
