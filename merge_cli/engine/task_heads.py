"""Language models and classifiers beside each other: one body, two kinds of head.

A reward model has `score` where its base has `lm_head`. Their bodies could be merged, their heads
could not, and leaving one out would make another model of what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge_cli.checkpoint.source import Source
from merge_cli.checkpoint.task_heads import is_task_head
from merge_cli.errors import Problem


def head_problems(sources: Sequence[Source]) -> list[Problem]:
    """A problem for each head that some of the models have, where others are language models."""
    heads = [_head(source) for source in sources]
    if not any(heads) or all(heads):
        return []
    language = [
        source.label
        for source, head in zip(sources, heads, strict=True)
        if not head and _is_language_model(source)
    ]
    if not language:
        return []
    hint = (
        "Merge classifiers with one another: without `base_model` (linear, slerp, ...), or with "
        "one that has the same head. A base gets it as `BASE+ADAPTER`, from a reward adapter."
    )
    return [
        Problem(
            f"{source.label} classifies with it; {', '.join(language)} is a language model",
            head,
            hint=hint,
        )
        for source, head in zip(sources, heads, strict=True)
        if head
    ]


def _head(source: Source) -> str:
    """The first tensor of a head for classes; empty for a model without one."""
    return next((name for name in source.tensors if is_task_head(name)), "")


def _is_language_model(source: Source) -> bool:
    named = source.config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return isinstance(first, str) and first.endswith(("ForCausalLM", "LMHeadModel"))
