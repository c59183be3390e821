"""README.md of a merged model: the card that the Hub shows, complete and free of local paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.checkpoint.source import Source
from merge_cli.engine.plan import Plan
from merge_cli.recipe.dump import dump_recipe
from merge_cli.recipe.reference import HUB, ModelRef, local_folder, short_labels
from merge_cli.report.card_metadata import (
    card_metadata,
    diffusers_class,
    generates_text,
    licence_note,
    repositories,
    used_sources,
)
from merge_cli.report.stages import Stages

_PAPERS = {"arXiv:": "https://arxiv.org/abs/"}
_MODEL_ID = re.compile(r'^model_id = ".*"$', re.MULTILINE)


def model_card(plan: Plan, defaults: Mapping[str, Any], title: str, stages: Stages) -> str:
    """The card's Markdown.

    Args:
        title: the name of the output folder, unless the recipe has a name.
        stages: the other documents of the recipe.
    """
    recipe = plan.recipe
    labels = [source.label for source in plan.sources]
    names = dict(zip(labels, short_labels(labels), strict=True))

    def public(model: ModelRef) -> str:
        """A Hub id as it is; of a local path, its last part alone."""
        if model.lora:
            base = ModelRef(model.path, model.revision)
            return f"{public(base)}+{public(ModelRef(model.lora, model.lora_revision))}"
        if local_folder(model.path, recipe.folder) is not None:
            return names.get(str(model), str(model).rstrip("/").rpartition("/")[2])
        return str(model).removeprefix(HUB)

    text = dump_recipe(
        recipe,
        locate=stages.named(public),
        defaults=defaults,
        inputs={},
        coefficients=f"./{FILE}" if plan.coefficients is not None else None,
        data=(lambda word: Path(word).name) if plan.gathered is not None else None,
        kind=plan.method.gathers,
    )
    text = "# a merge-cli recipe\n" + "---\n".join([*stages.documents(None), text])
    method = plan.method
    by_label = {str(spec.model): public(spec.model) for spec in recipe.source_specs}
    if recipe.base_model is not None:
        by_label[str(recipe.base_model)] = public(recipe.base_model)
    shown = {label: by_label.get(label, names[label]) for label in labels}
    sources = [f"`{shown[plan.sources[i].label]}`" for i in plan.operands]
    on_base = plan.method.needs_base and recipe.base_model is not None
    licence = licence_note(plan)
    lines = [
        "---",
        yaml.safe_dump(
            card_metadata(plan, stages.hub_ids()), sort_keys=False, allow_unicode=True
        ).strip(),
        "---",
        f"# {recipe.name or title}",
        "",
        f"A merge of {_listed(sources)} by `{recipe.merge_method}`"
        + (f" on `{public(recipe.base_model)}`" if on_base and recipe.base_model else "")
        + f", made with merge-cli {version('merge-cli')}.",
        "",
        f"**{recipe.merge_method}**: {method.summary}"
        + (f" ({_paper(method.paper)})" if method.paper else ""),
        "",
        *_usage(plan, title),
        "## Sources",
        "",
        "| model | role | revision |",
        "|---|---|---|",
        *(_source_row(plan, source, shown[source.label], stages) for source in used_sources(plan)),
        *stages.source_rows(),
        "",
        *([licence, ""] if licence else []),
        "## Recipe",
        "",
        f"```yaml\n{text.strip()}\n```",
        "",
        "`merge_recipe.yaml` beside this card is the same recipe with its inputs pinned; running "
        "it again gives the same bytes. `merge_report.html` shows how the sources relate.",
        "",
    ]
    return "\n".join(lines)


def card_for(card: str, repo_id: str) -> str:
    """The card as it is shown on the Hub: its example loads the model from there."""
    return _MODEL_ID.sub(lambda _: f"model_id = {json.dumps(repo_id)}", card, count=1)


def _usage(plan: Plan, title: str) -> list[str]:
    generates = generates_text(plan.config)
    name = diffusers_class(plan)
    if name:
        return [
            "## Use",
            "",
            "```python",
            f"from diffusers import {name}",
            "",
            f"model_id = {json.dumps(title, ensure_ascii=False)}",
            f"model = {name}.from_pretrained(model_id)",
            "```",
            "",
        ]
    if not plan.config:  # weights alone: no library knows how to open them
        return []
    kind = "AutoModelForCausalLM" if generates else "AutoModel"
    lines = [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f"model_id = {json.dumps(title, ensure_ascii=False)}",
        f'model = {kind}.from_pretrained(model_id, dtype="auto")',
        "tokenizer = AutoTokenizer.from_pretrained(model_id)",
    ]
    if generates:
        lines += [
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=50)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    return ["## Use", "", "```python", *lines, "```", ""]


def _source_row(plan: Plan, source: Source, name: str, stages: Stages) -> str:
    based = plan.base is not None and source is plan.sources[plan.base]
    merged = any(source is plan.sources[i] for i in plan.operands)
    role = " and ".join(word for word, holds in (("base", based), ("merged", merged)) if holds)
    if name in stages.names:
        return f"| `{name}` | {role} | made by the recipe |"
    found = repositories(source)
    commits = [
        f"[`{one.commit}`](https://huggingface.co/{one.repo_id}/tree/{one.commit})" for one in found
    ]
    if len(found) < 1 + bool(source.adapter):
        commits.append("a local folder")
    if len(found) == 1 and not source.adapter:
        name = f"[{name}](https://huggingface.co/{found[0].repo_id})"
    else:
        name = f"`{name}`"
    return f"| {name} | {role} | {', '.join(commits)} |"


def _listed(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else ", ".join(unique[:-1]) + f" and {unique[-1]}"


def _paper(paper: str) -> str:
    for prefix, address in _PAPERS.items():
        if paper.startswith(prefix):
            return f"[{paper}]({address}{paper.removeprefix(prefix)})"
    return paper
