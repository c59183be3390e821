"""One tokenizer for all sources: predictions of other tokens cannot be compared."""

from __future__ import annotations

import json
from typing import Any

from merge_cli.checkpoint.fingerprint import auxiliary_fingerprint
from merge_cli.errors import MismatchError, Problem
from merge_cli.evaluation.live import load_tokenizer
from merge_cli.planning.plan import Plan

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
        message = _difference(tokenizer, other)
        if message:
            problems.append(
                Problem(f"has another tokenizer than {first.label}: {message}", source.label)
            )
        elif other.chat_template != tokenizer.chat_template:
            other_templates.append(source.label)
    if problems:
        message = "the sources' tokenizers differ: their predictions cannot be compared"
        raise MismatchError(problems, message)
    if not other_templates:
        return tokenizer, ""
    return tokenizer, f"{first.label}'s, for all data; {', '.join(other_templates)} has another"


def _difference(first: Any, second: Any) -> str:
    """What makes other tokens of a text; empty where nothing does."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    if ours != theirs:
        moved = sum(theirs.get(token) != number for token, number in ours.items())
        return f"{len(theirs):,} entries against {len(ours):,}, {moved:,} of them elsewhere"
    for part, parts in zip(_PARTS, zip(_parts(first), _parts(second), strict=True), strict=True):
        if parts[0] != parts[1]:
            return f"the same entries, and another {part}"
    if first.bos_token_id != second.bos_token_id:
        return f"a text begins with {second.bos_token!r} instead of {first.bos_token!r}"
    return ""


def _parts(tokenizer: Any) -> list[Any]:
    """The steps of a fast tokenizer; of a slow one its vocabulary is all that can be compared."""
    if not tokenizer.is_fast:
        return [None] * len(_PARTS)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return [whole[part] for part in _PARTS]
