"""The model card (README.md) of a merge, without local paths, and its front matter.

The front matter is what the Hub reads; it follows from the cards of the sources.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from merge_cli.checkpoint.cards import read_card
from merge_cli.checkpoint.coefficients import FILE
from merge_cli.checkpoint.config import CLASS
from merge_cli.hub.models import HubModel
from merge_cli.planning.plan import Plan
from merge_cli.recipe.dump import dump_recipe
from merge_cli.recipe.reference import short_labels
from merge_cli.report.stages import Stages, public_name
from merge_cli.sources.source import Source

_PAPERS = {"arXiv:": "https://arxiv.org/abs/"}
_MODEL_ID = re.compile(r'^model_id = ".*"$', re.MULTILINE)
# Keys of the card that a recipe's `metadata` may set.
AUTHOR_KEYS = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_LICENCE = ("license", "license_name", "license_link")
_TEXT_GENERATION = ("ForCausalLM", "LMHeadModel")


def model_card(plan: Plan, defaults: Mapping[str, Any], title: str, stages: Stages) -> str:
    """The card's Markdown.

    Args:
        title: the name of the output folder, for recipes without a name.
        stages: the earlier stages of the recipe.
    """
    recipe = plan.recipe
    labels = [source.label for source in plan.sources]
    names = dict(zip(labels, short_labels(labels), strict=True))
    public = public_name(recipe.folder, names)
    folder = recipe.statistics_folder
    needs_data = plan.calibrated is not None and folder is None
    text = dump_recipe(
        recipe,
        locate=stages.named(public),
        defaults=defaults,
        inputs={},
        coefficients=f"./{FILE}" if plan.coefficients is not None else None,
        statistics=f"./{Path(folder).name}" if folder else None,
        data=(lambda word: Path(word).name) if needs_data else None,
        kind=plan.method.gathers,
    )
    text = "# a merge-cli recipe\n" + "---\n".join([*stages.documents(None), text])
    method = plan.method
    by_label = {str(spec.model): public(spec.model) for spec in recipe.source_specs}
    if recipe.base_model is not None:
        by_label[str(recipe.base_model)] = public(recipe.base_model)
    public_names = {label: by_label.get(label, names[label]) for label in labels}
    sources = [f"`{public_names[plan.sources[i].label]}`" for i in plan.operands]
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
        *(
            _source_row(plan, source, public_names[source.label], stages)
            for source in used_sources(plan)
        ),
        *stages.source_rows(),
        "",
        *([licence, ""] if licence else []),
        "## Recipe",
        "",
        f"```yaml\n{text.strip()}\n```",
        "",
        "`merge_recipe.yaml` in this folder is the same recipe with its inputs pinned; running it "
        "again gives the same bytes. `merge_report.html` shows how the sources relate.",
        "",
    ]
    return "\n".join(lines)


def card_for(card: str, repo_id: str) -> str:
    """The card for the Hub: its example loads the model from there."""
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
    if not plan.config:  # only weights: no library opens them
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
    is_base = plan.base is not None and source is plan.sources[plan.base]
    is_merged = any(source is plan.sources[i] for i in plan.operands)
    role = " and ".join(word for word, holds in (("base", is_base), ("merged", is_merged)) if holds)
    if name in stages.names:
        return f"| `{name}` | {role} | made by the recipe |"
    repos = repositories(source)
    commits = [
        f"[`{repository.commit}`](https://huggingface.co/{repository.repo_id}/tree/{repository.commit})"
        for repository in repos
    ]
    if len(repos) < 1 + bool(source.adapter):
        commits.append("a local folder")
    if len(repos) == 1 and not source.adapter:
        name = f"[{name}](https://huggingface.co/{repos[0].repo_id})"
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


def source_cards(source: Source) -> list[dict[str, Any]]:
    """The metadata of a source's card, and of its adapter's; empty where there is none."""
    roots = [source.root, *([source.adapter.root] if source.adapter else [])]
    return [read_card(root)[0] for root in roots]


def repositories(source: Source) -> list[HubModel]:
    """The Hub repositories of a source: the model's, and its adapter's."""
    repos = [source.hub, source.adapter.hub if source.adapter else None]
    return [repository for repository in repos if repository is not None]


def card_metadata(plan: Plan, of_stages: Sequence[str] = ()) -> dict[str, Any]:
    """The front matter of the merge, in the usual order of the Hub's cards.

    Args:
        of_stages: repositories that earlier stages merge.

    A licence is stated only where every source states the same one; languages and data sets are
    those of all sources. The recipe's `metadata` overrides all of them.
    """
    used = used_sources(plan)
    cards = [card for source in used for card in source_cards(source)]
    stated = {
        key: plan.recipe.metadata[key] for key in AUTHOR_KEYS if plan.recipe.metadata.get(key)
    }
    front: dict[str, Any] = {}
    # `base_model` links to the Hub: names of local folders would lead nowhere.
    repository_ids = [repository.repo_id for source in used for repository in repositories(source)]
    bases = list(dict.fromkeys([*repository_ids, *of_stages]))
    if bases:
        front |= {"base_model": bases, "base_model_relation": "merge"}
    licences = [tuple(_word(card, key) for key in _LICENCE) for card in cards]
    if "license" not in stated and len(set(licences)) == 1 and licences[0][0]:
        front |= {k: v for k, v in zip(_LICENCE, licences[0], strict=True) if v}
    for key in ("language", "datasets"):
        values = _all_words(cards, key)
        if values and key not in stated:
            front[key] = values
    front["library_name"] = "diffusers" if diffusers_class(plan) else "transformers"
    if generates_text(plan.config):
        front["pipeline_tag"] = "text-generation"
    tags = ["merge", "merge-cli", plan.recipe.merge_method]
    return {**front, **stated, "tags": list(dict.fromkeys(tags))}


def licence_note(plan: Plan) -> str:
    """A sentence where the sources have different licences; otherwise empty."""
    if plan.recipe.metadata.get("license"):
        return ""
    cards = [card for source in used_sources(plan) for card in source_cards(source)]
    if len({tuple(_word(card, key) for key in _LICENCE) for card in cards}) == 1:
        return ""  # one licence for all, or none
    stated = [_word(card, "license") for card in cards]
    licences = sorted({word for word in stated if word})
    silent = sum(not word for word in stated)
    text = f"The sources state these licences: {', '.join(licences)}"
    text += f"; {silent} of them state{'s' * (silent == 1)} none" if silent else ""
    return text + ". Which one the merge may carry is for its author to say."


def used_sources(plan: Plan) -> list[Source]:
    """Every source of weights, the base first."""
    first = [plan.base] if plan.base is not None and plan.method.needs_base else []
    return [plan.sources[i] for i in dict.fromkeys([*first, *plan.operands])]


def generates_text(config: Mapping[str, Any]) -> bool:
    """Whether the architecture that a config names is a causal language model."""
    names = config.get("architectures") or []
    return isinstance(names, list) and any(str(n).endswith(_TEXT_GENERATION) for n in names)


def diffusers_class(plan: Plan) -> str:
    """The class of diffusers that opens the output; empty for other models."""
    if set(plan.sources[plan.config_index].stems) != {""}:
        return "DiffusionPipeline"
    return str(plan.config.get(CLASS) or "")


def _word(card: Mapping[str, Any], key: str) -> str:
    value = card.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.strip() if isinstance(value, str) else ""


def _all_words(cards: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    def words(value: Any) -> Iterable[str]:
        listed = value if isinstance(value, list) else [value]
        return (word.strip() for word in listed if isinstance(word, str) and word.strip())

    return list(dict.fromkeys(word for card in cards for word in words(card.get(key))))
