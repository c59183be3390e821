"""Advice on what to merge first, with measured reasons.

The rules come from the papers and from this project's own small models (docs/experiments.md). They
choose where to begin; held-out data decides. `advised_recipe` writes it down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge_cli.analysis.findings import LOUDER, Evidence
from merge_cli.analysis.measures import Measures, pairs
from merge_cli.analysis.result import Advice, Finding, Suggestion
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.values import Parameter

ALIKE = 0.3
CONFLICT = 0.3
FEW_SHARED = 0.2  # of the elements: sparse changes that share more are not simply added
SMALL = 0.02
SHORT = 0.01  # of the base's norm: experts of twelve steps in docs/experiments.md
MANY = 4
EXPERIMENTS = "docs/experiments.md"
SLERP = Suggestion(
    "slerp",
    "With two models, the great circle keeps the norm that an average shrinks.",
    EXPERIMENTS,
)
_LEFT_OUT = ("unrelated", "vocabulary", "equals_base")  # models that a recipe leaves out


def advise(evidence: Evidence, findings: Sequence[Finding], recipe: Recipe) -> Advice:
    """Advice for these models.

    Args:
        recipe: of the opened models, in the order of `evidence.models`.
    """
    total = evidence.total
    if total is None or evidence.problems:
        message = (
            "They do not fit one another; make them fit first, or leave out the one that does not."
        )
        return Advice(message)
    merged = _worth_merging(evidence, findings)
    if len(merged) < 2 and (evidence.base is None or not merged):
        return Advice(
            "Nothing is left to merge: the models are the same, or have nothing in common."
        )
    if evidence.base is None:
        return _without_base(evidence, total, merged, recipe)
    if len(merged) == 1:
        return _one_source(evidence, merged[0], recipe)
    return _with_base(evidence, total, merged, findings, recipe)


def _worth_merging(evidence: Evidence, findings: Sequence[Finding]) -> list[int]:
    """Indexes of sources that are worth merging: related, changed, and no duplicates."""
    left_out = {
        name
        for v in findings
        if v.kind in _LEFT_OUT and (evidence.base or v.kind == "vocabulary")
        for name in v.models
    }
    if evidence.base is None and any(v.kind == "unrelated" for v in findings):
        return []
    duplicates = {v.models[1] for v in findings if v.kind == "identical"}
    return [i for i, name in enumerate(evidence.models) if name not in left_out | duplicates]


def _without_base(evidence: Evidence, total: Measures, merged: list[int], recipe: Recipe) -> Advice:
    distances = [d for i, j, d in pairs(total.distance) if i in merged and j in merged]
    reason = (
        f"The models lie {_range(distances)} of their norm apart. Without the base they came from "
        "there are no task vectors, and signs and conflicts cannot be seen: give it with --base."
    )
    suggestions = [Suggestion("soup", reason, f"arXiv:2203.05482; {EXPERIMENTS}")]
    if len(merged) == 2:
        suggestions.append(SLERP)
    return Advice(
        "Begin with the plain average, and compare on held-out data.",
        tuple(suggestions),
        whole_models(recipe, "soup", merged, {}, {}),
        ("soup: the plain average; every weight is 1.",),
    )


def _one_source(evidence: Evidence, source: int, recipe: Recipe) -> Advice:
    name = evidence.models[source]
    reason = (
        f"{name} is the only source that differs from {evidence.base}. Between the two, a scale of "
        "its change trades what it learned for what the base kept."
    )
    return Advice(
        "There is one source: nothing to combine, but its change can be scaled.",
        (Suggestion("task_arithmetic", reason, "arXiv:2109.01903, arXiv:2212.04089"),),
        whole_models(recipe, "task_arithmetic", [source], {"lambda": 0.5}, {}),
        ("lambda 0.5: half way; try 0.3 to 1.",),
    )


def _with_base(
    evidence: Evidence,
    total: Measures,
    merged: list[int],
    findings: Sequence[Finding],
    recipe: Recipe,
) -> Advice:
    inner = evidence.inner or total  # an embedding may dominate the cosines of all tensors
    cosines = [c for i, j, c in pairs(inner.cosine) if i in merged and j in merged]
    where = "in the layers" if evidence.inner else "of all tensors"
    norms = [(total.relative_norm or ())[i] or 0.0 for i in merged]
    sparse = {n for v in findings if v.kind in ("rl_like", "sparse") for n in v.models}
    all_sparse = all(evidence.models[i] in sparse for i in merged)
    weights, comments = _weights(evidence, merged, norms)
    size = len(merged)
    if all_sparse and (total.shared or 0.0) <= FEW_SHARED:
        scale, summary = 1.0, "Begin with the sum of the changes: they are sparse."
        reason = (
            f"All sources change few weights, and only {_percent(total.shared)} of the elements "
            "are changed by two of them or more, so that a sum keeps most changes whole. An "
            f"average would divide it by {size}: changes of one step of bfloat16 "
            f"({_range((total.one_step or ())[i] for i in merged)} of them) may be rounded away."
        )
        comments.append("lambda 1: the sum. Sparse changes hardly meet, and keep their size.")
    else:
        scale, summary = round(1 / size, 4), "Begin with the average of the changes."
        alike = bool(cosines) and min(cosines) >= ALIKE
        reason = (
            f"The changes are alike (cosines {where} {_numbers(cosines)}): where they are, "
            "averaging has been competitive with costlier methods."
            if alike
            else f"The changes have little in common (cosines {where} {_numbers(cosines)}). "
            "Task arithmetic is the method that has helped most reliably on language models."
        )
        reason += f" {_measured_here(size, max(norms))}"
        comments.append(
            f"lambda {scale:g}: 1/{size}, with equal weights the plain average. Raise it while "
            "held-out scores improve."
        )
    papers = "arXiv:2212.04089, arXiv:2511.21437, arXiv:2410.08371"
    suggestions = [Suggestion("task_arithmetic", reason, f"{papers}; {EXPERIMENTS}")]
    suggestions += _alternatives(evidence, total, merged, norms, all_sparse)
    return Advice(
        f"{summary} Compare on held-out data.",
        tuple(suggestions),
        whole_models(recipe, "task_arithmetic", merged, {"lambda": scale}, weights),
        tuple(comments),
    )


def _measured_here(sources: int, norm: float) -> str:
    """Experience with the scale on this project's small models (docs/experiments.md, 1 to 3)."""
    if norm <= SHORT:
        return (
            f"On this project's small models, changes as short as these (at most {_percent(norm)} "
            "of ‖θ₀‖) kept more at a scale of 0.4 to 0.7 than at 1/3: try larger ones."
        )
    if sources >= MANY:
        return (
            "On this project's small models, with four sources a scale below 1/S was better than "
            "the average: try smaller ones."
        )
    return (
        "On this project's small models a scale that was chosen on held-out text, often 0.1 to "
        "0.2, was as good as the average of unlike experts or better."
    )


def _alternatives(
    evidence: Evidence, total: Measures, merged: list[int], norms: Sequence[float], sparse: bool
) -> list[Suggestion]:
    suggestions = []
    share = total.conflict / total.shared if total.conflict and total.shared else 0.0
    if share >= CONFLICT:
        chance = 1 - 2.0 ** (1 - len(evidence.models))
        reason = (
            f"Of the elements that several sources change, {_percent(share)} are changed in "
            f"opposite directions (by chance: {_percent(chance)}, where all change them). Choosing "
            "one sign for each element keeps changes from cancelling. On this project's small "
            "models that lost to the average more often than it won: compare the two."
        )
        suggestions.append(Suggestion("ties", reason, f"arXiv:2306.01708; {EXPERIMENTS}"))
    if not sparse and max(norms) <= SMALL:
        reason = (
            f"The changes are small (‖δ‖/‖θ₀‖ {_range(norms)}) and dense, which is where dropping "
            "most of them at random has been reported to cost little."
        )
        suggestions.append(Suggestion("dare", reason, f"arXiv:2311.03099; {EXPERIMENTS}"))
    return suggestions


def _weights(
    evidence: Evidence, merged: list[int], norms: Sequence[float]
) -> tuple[dict[int, float], list[str]]:
    """Weights that give changes of very different size the same size."""
    quiet, loud = min(norms), max(norms)
    if not quiet or loud < LOUDER * quiet:
        return {}, []
    weights = {i: round(quiet / norm, 3) for i, norm in zip(merged, norms, strict=True)}
    line = f"weights: so that every change is as large as the smallest ({_range(norms)} of ‖θ₀‖)."
    return weights, [line]


def whole_models(
    recipe: Recipe,
    method: str,
    merged: list[int],
    scale: dict[str, float],
    weights: dict[int, float],
) -> Recipe:
    """A recipe of some of a recipe's models.

    Args:
        merged: their indexes.
        scale: parameters of the merge.
        weights: index -> weight; 1 where it has none.
    """

    def setting(name: str, value: float, key: str) -> dict[str, Parameter]:
        return {name: Parameter(name, value, f"{key}.parameters.{name}")}

    return Recipe(
        method,
        recipe.base_model,
        tuple(
            SourceSpec(
                recipe.models[i].model,
                f"models[{n}]",
                setting("weight", weights.get(i, 1.0), f"models[{n}]"),
            )
            for n, i in enumerate(merged)
        ),
        parameters={name: Parameter(name, v, f"parameters.{name}") for name, v in scale.items()},
        seed=recipe.seed,
        folder=recipe.folder,
    )


def _range(shares: Iterable[float | None]) -> str:
    values = sorted(v for v in shares if v is not None)
    if not values:
        return "unknown"
    low, high = _percent(values[0]), _percent(values[-1])
    return low if low == high else f"{low} to {high}"


def _numbers(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.3g} %"
