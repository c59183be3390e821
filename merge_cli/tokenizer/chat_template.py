"""Choosing the output's chat templates: a source's, a well-known one, or the recipe's.

A tokenizer may have several by name: `default`, and others such as `tool_use`. transformers stores
the first as chat_template.jinja and the others in a folder beside it; where there are such files,
it reads no other place.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge_cli.checkpoint.auxiliary_files import refuse_links
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import AUTO
from merge_cli.sources.source import Source
from merge_cli.system.chat_templates import template_error
from merge_cli.system.untrusted import read_mapping
from merge_cli.tokenizer.files import TEMPLATES, chat_templates, template_files

FILE = "chat_template.jinja"
DEFAULT = "default"
_NAME = re.compile(r"\w[\w.-]{0,99}")  # what becomes the name of a file


@dataclass(frozen=True)
class ChosenTemplates:
    """The output's templates, if the recipe chooses them.

    Attributes:
        text: of the default one; None keeps all that the tokenizer's files have.
        named: the others, by name.
        notes: where they come from, and what is left out.
    """

    text: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def files(self) -> dict[str, str]:
        """The files that hold them, by name."""
        if self.text is None:
            return {}
        named = {f"{TEMPLATES}/{name}.jinja": text for name, text in self.named.items()}
        return {FILE: self.text, **named}


def choose_templates(
    recipe: Recipe, sources: Sequence[Source], tokenizer_source: Source
) -> ChosenTemplates:
    """The output's templates, where they differ from the tokenizer's.

    A template of the recipe is the default; the tokenizer's others stay. `auto` takes all of one
    model: the first of those whose default template most have.

    Args:
        tokenizer_source: whose tokenizer the output has.

    Raises:
        SourceError: a chosen template is a link out of its model's folder.
        CorruptFileError: templates that are no text.
    """
    if recipe.chat_template is None:
        return ChosenTemplates()
    if recipe.chat_template != AUTO:
        return _with_others(recipe.chat_template, tokenizer_source, "chat template: the recipe's")
    templates = [chat_templates(source) for source in sources]
    broken = [template_error(texts.get(DEFAULT, "")) for texts in templates]
    notes = tuple(
        f"{source.label}: its chat template is not taken, since it is not valid Jinja: {error}"
        for source, error in zip(sources, broken, strict=True)
        if error
    )
    usable = {i: t[DEFAULT] for i, t in enumerate(templates) if t.get(DEFAULT) and not broken[i]}
    if not usable:
        which = "that can be taken; the tokenizer's files stay as they are" if any(broken) else ""
        note = f"chat template: no model has a chat template {which}".rstrip()
        return ChosenTemplates(notes=(*notes, note))
    text, count = Counter(usable.values()).most_common(1)[0]
    source = sources[next(i for i, template in usable.items() if template == text)]
    refuse_links(template_files(source), source.root, source.label)
    origin = f"chat template: {source.label}'s, which {count} of {len(sources)} models have"
    chosen = _with_others(text, source, origin)
    left_out = sorted(chat_templates(tokenizer_source).keys() - {DEFAULT} - chosen.named.keys())
    if tokenizer_source is not source and left_out:
        notes += (f"{tokenizer_source.label}: its chat template {', '.join(left_out)} is left out",)
    return ChosenTemplates(text, chosen.named, (*chosen.notes, *notes))


def _with_others(text: str, source: Source, origin: str) -> ChosenTemplates:
    """A default template, and the others of a source."""
    named: dict[str, str] = {}
    notes: list[str] = []
    for name, template in chat_templates(source).items():
        error = template_error(template) if _NAME.fullmatch(name) else "its name is no file's"
        if name == DEFAULT:
            continue
        if error:
            notes.append(f"{source.label}: its chat template {name!r} is left out: {error}")
        else:
            named[name] = template
    listed = f"; with {source.label}'s {', '.join(sorted(named))}" if named else ""
    return ChosenTemplates(text, named, (origin + listed, *notes))


def without_template(config: Path) -> bytes | None:
    """tokenizer_config.json without its template, where chat_template.jinja replaces it."""
    if not config.exists():
        return None
    mapping = read_mapping(config)
    if "chat_template" not in mapping:
        return None
    del mapping["chat_template"]
    return (json.dumps(mapping, ensure_ascii=False, indent=2) + "\n").encode()
