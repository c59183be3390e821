"""Choosing the output's chat template: a source's, a well-known one, or the recipe's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import AUTO
from merge_cli.sources.source import Source
from merge_cli.system.untrusted import read_mapping
from merge_cli.tokenizer.files import chat_templates

FILE = "chat_template.jinja"


def choose_template(recipe: Recipe, sources: Sequence[Source]) -> tuple[str | None, list[str]]:
    """The output's template, if it differs from the tokenizer's, and a note on its origin."""
    if recipe.chat_template is None:
        return None, []
    if recipe.chat_template != AUTO:
        return recipe.chat_template, ["chat template: the recipe's"]
    text, whose = most_common_template(sources)
    return text, [f"chat template: {whose}"]


def most_common_template(sources: Sequence[Source]) -> tuple[str | None, str]:
    """The template that most sources have, the first of equals; and a note on its origin."""
    templates = [(source.label, chat_templates(source).get("default")) for source in sources]
    counts = Counter(text for _, text in templates if text)
    if not counts:
        return None, "no model has a chat template"
    text, count = counts.most_common(1)[0]
    label = next(label for label, template in templates if template == text)
    return text, f"{label}'s, which {count} of {len(templates)} models have"


def without_template(config: Path) -> bytes | None:
    """tokenizer_config.json without its template, where chat_template.jinja replaces it."""
    if not config.exists():
        return None
    mapping = read_mapping(config)
    if "chat_template" not in mapping:
        return None
    del mapping["chat_template"]
    return (json.dumps(mapping, ensure_ascii=False, indent=2) + "\n").encode()
