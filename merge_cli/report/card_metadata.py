"""The front matter of a model card: what the Hub reads, from what the sources say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merge_cli.checkpoint.card import read_card
from merge_cli.checkpoint.config import CLASS
from merge_cli.checkpoint.hub import HubModel
from merge_cli.checkpoint.source import Source
from merge_cli.engine.plan import Plan

# What a recipe's `metadata` may say of the card in its author's words; everything else stays free.
OWN_WORDS = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_LICENCE = ("license", "license_name", "license_link")
_TEXT_GENERATION = ("ForCausalLM", "LMHeadModel")


def source_cards(source: Source) -> list[dict[str, Any]]:
    """What a source's own card says, and that of the adapter on it; empty where there is none."""
    roots = [source.root, *([source.adapter.root] if source.adapter else [])]
    return [read_card(root)[0] for root in roots]


def repositories(source: Source) -> list[HubModel]:
    """Where a source comes from on the Hub: itself, and the adapter on it."""
    found = [source.hub, source.adapter.hub if source.adapter else None]
    return [one for one in found if one is not None]


def card_metadata(plan: Plan, of_stages: Sequence[str] = ()) -> dict[str, Any]:
    """The front matter of the merge, in the order in which the Hub's own cards have it.

    Args:
        of_stages: repositories that the recipe's other documents merge.

    A licence is stated only where every source states the same one; languages and data sets are
    those of all sources. The recipe's `metadata` has the last word on all of them.
    """
    used = used_sources(plan)
    cards = [card for source in used for card in source_cards(source)]
    own = {key: plan.recipe.metadata[key] for key in OWN_WORDS if plan.recipe.metadata.get(key)}
    front: dict[str, Any] = {}
    # `base_model` links to the Hub: names of local folders would lead nowhere.
    own_bases = [one.repo_id for source in used for one in repositories(source)]
    bases = list(dict.fromkeys([*own_bases, *of_stages]))
    if bases:
        front |= {"base_model": bases, "base_model_relation": "merge"}
    licences = [tuple(_word(card, key) for key in _LICENCE) for card in cards]
    if "license" not in own and len(set(licences)) == 1 and licences[0][0]:
        front |= {k: v for k, v in zip(_LICENCE, licences[0], strict=True) if v}
    for key in ("language", "datasets"):
        words = _all_words(cards, key)
        if words and key not in own:
            front[key] = words
    front["library_name"] = "diffusers" if diffusers_class(plan) else "transformers"
    if generates_text(plan.config):
        front["pipeline_tag"] = "text-generation"
    tags = ["merge", "merge-cli", plan.recipe.merge_method]
    return {**front, **own, "tags": list(dict.fromkeys(tags))}


def licence_note(plan: Plan) -> str:
    """A sentence where the sources do not agree on a licence; empty where nothing is to be said."""
    if plan.recipe.metadata.get("license"):
        return ""
    cards = [card for source in used_sources(plan) for card in source_cards(source)]
    if len({tuple(_word(card, key) for key in _LICENCE) for card in cards}) == 1:
        return ""  # one licence for all, or none known at all
    stated = [_word(card, "license") for card in cards]
    known = sorted({word for word in stated if word})
    silent = sum(not word for word in stated)
    text = f"The sources state these licences: {', '.join(known)}"
    text += f"; {silent} of them state{'s' * (silent == 1)} none" if silent else ""
    return text + ". Which one the merge may carry is for its author to say."


def used_sources(plan: Plan) -> list[Source]:
    """Every source that weights come from, the base first."""
    first = [plan.base] if plan.base is not None and plan.method.needs_base else []
    return [plan.sources[i] for i in dict.fromkeys([*first, *plan.operands])]


def generates_text(config: Mapping[str, Any]) -> bool:
    """Whether the architecture that a config names is a causal language model."""
    names = config.get("architectures") or []
    return isinstance(names, list) and any(str(n).endswith(_TEXT_GENERATION) for n in names)


def diffusers_class(plan: Plan) -> str:
    """What opens the output, if it is one of diffusers' models or pipelines."""
    if set(plan.sources[plan.donor].stems) != {""}:
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
