"""The card of an adapter that was made here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from merge_cli.adapters.factors import RankTruncation
from merge_cli.engine.plan import Plan
from merge_cli.recipe.reference import hub_id, short_labels
from merge_cli.report.card_metadata import repositories, source_cards

if TYPE_CHECKING:
    from merge_cli.adapters.extract import ExtractedAdapter


def extraction_card(plan: Plan, result: ExtractedAdapter, cut: RankTruncation) -> str:
    """Of a fine-tune's change."""
    base, tuned = (plan.sources[i] for i in (plan.base or 0, plan.operands[0]))
    front: dict[str, Any] = {}
    named = [one.repo_id for one in repositories(base)]
    if named:
        front |= {"base_model": named[0], "base_model_relation": "adapter"}
    licences = {str(card.get("license")) for card in source_cards(tuned) if card.get("license")}
    if len(licences) == 1:
        front["license"] = licences.pop()
    ranks = [change.rank for change in result.changes if change.rank is not None]
    size = f"rank {min(ranks)} to {max(ranks)}" if ranks else "no factors"
    text = [
        f"What `{tuned.label}` has changed of `{base.label}`, extracted by merge-cli: {size} "
        f"(cut at {cut}), {100 * result.share:.1f} % of the change's sum of squares.",
        *_left_out(result),
    ]
    return card(front, result.path.name, text, base.label)


def merge_card(plan: Plan, base: str | None, title: str, report: Mapping[str, Any]) -> str:
    """Of adapters that were merged."""
    about = report["adapter"]
    front: dict[str, Any] = {}
    if base and hub_id(base):
        front |= {"base_model": base, "base_model_relation": "adapter"}
    licences = {
        str(card.get("license"))
        for source in plan.sources
        for card in source_cards(source)
        if card.get("license")
    }
    if len(licences) == 1:
        front["license"] = licences.pop()
    labels = [source.label for source in plan.sources if source.adapter]
    sources = ", ".join(f"`{label}`" for label in short_labels(labels))
    ranks = [module["rank"] for module in about["modules"].values()] or [0]
    text = [
        f"A {plan.recipe.merge_method} merge of the adapters {sources}, made by merge-cli without "
        f"the model that they are of: rank {min(ranks)} to {max(ranks)}, "
        f"{100 * about['share']:.1f} % of the merged change's sum of squares.",
        "",
        "## Recipe",
        "",
        f"```yaml\n{report['recipe']['text'].strip()}\n```",
    ]
    return card(front, title, text, base)


def card(front: Mapping[str, Any], title: str, text: Sequence[str], base: str | None) -> str:
    """Front matter, title, text and how to use it."""
    known = {**front, "library_name": "peft", "tags": ["lora", "merge-cli"]}
    lines = [
        "---",
        yaml.safe_dump(known, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {title}",
        "",
        *text,
        "",
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base or 'BASE')})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(title)})",
        "```",
        "",
    ]
    return "\n".join(lines)


def _left_out(result: ExtractedAdapter) -> list[str]:
    total = sum(change.squares for change in result.changes) or 1.0
    reasons: dict[str, float] = {}
    for change in result.changes:
        if change.why:
            reasons[change.why] = reasons.get(change.why, 0.0) + change.squares / total
    return [
        f"Left out, {100 * share:.1f} % of the change: {why}." for why, share in reasons.items()
    ]
