"""README.md of a merged model: the card that the Hub shows, complete and free of local paths."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.engine.plan import Plan
from merge_cli.recipe.dump import dump_recipe
from merge_cli.recipe.reference import ModelRef, local_folder, short_labels
from merge_cli.report.stages import Stages

_PAPERS = {"arXiv:": "https://arxiv.org/abs/"}


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
        if local_folder(model.path, recipe.folder) is not None:
            return names.get(str(model), str(model).rstrip("/").rpartition("/")[2])
        return str(model)

    own = [source.hub.repo_id for source in plan.sources if source.hub is not None]
    hub_ids = list(dict.fromkeys([*own, *stages.hub_ids()]))
    # `base_model` links to the Hub: names of local folders would lead nowhere
    front: dict[str, Any] = {}
    if hub_ids:
        front["base_model"] = hub_ids
    front |= {"library_name": "transformers", "tags": ["merge", "merge-cli", recipe.merge_method]}
    text = dump_recipe(
        recipe, locate=stages.named(public), defaults=defaults, inputs={},
        coefficients=f"./{FILE}" if plan.coefficients is not None else None,
    )  # fmt: skip
    text = "# a merge-cli recipe\n" + "---\n".join([*stages.documents(None), text])
    method = plan.method
    by_label = {str(spec.model): public(spec.model) for spec in recipe.source_specs}
    merged = [plan.sources[i].label for i in plan.operands]
    sources = [f"`{by_label.get(label, names[label])}`" for label in merged]
    on_base = plan.method.needs_base and recipe.base_model is not None
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
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
        "## Recipe",
        "",
        f"```yaml\n{text.strip()}\n```",
        "",
        "`merge_recipe.yaml` beside this card is the same recipe with its inputs pinned; running "
        "it again gives the same bytes. `merge_report.html` shows how the sources relate.",
        "",
    ]
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else ", ".join(unique[:-1]) + f" and {unique[-1]}"


def _paper(paper: str) -> str:
    for prefix, address in _PAPERS.items():
        if paper.startswith(prefix):
            return f"[{paper}]({address}{paper.removeprefix(prefix)})"
    return paper
