"""Findings about models, from the numbers: each with the measured values and its threshold.

The thresholds are rules of thumb, chosen so that the usual cases fall well to one side; a finding
is a reason to look, not a proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from merge_cli.analysis.differences import RouterDifference, TokenizerDifference
from merge_cli.analysis.measures import Measures, pairs
from merge_cli.analysis.result import Finding
from merge_cli.analysis.spectra import Spectrum

UNRELATED_COSINE = 0.7
FAR = 0.3
RL_UNCHANGED, RL_NORM = 0.7, 0.02
LOW_RANK = 0.25
LOUDER = 2.0
CONCENTRATED = 0.5
PERMUTED = 0.05
_RL = "arXiv:2505.11711: reinforcement learning changed 5 to 30 % of the weights"


@dataclass(frozen=True)
class Evidence:
    """What findings and advice are based on; rows are in the order of `models`."""

    base: str | None
    models: tuple[str, ...]
    total: Measures | None
    inner: Measures | None
    kinds: Sequence[Measures]
    spectra: Sequence[Spectrum]
    sparsity: Sequence[float | None] | None
    problems: Sequence[str]
    tokenizers: Sequence[TokenizerDifference]
    routers: Sequence[RouterDifference] = ()


def findings_of(evidence: Evidence) -> tuple[Finding, ...]:
    """Everything that stands out; first what prevents a merge."""
    return tuple(
        [
            *_mismatches(evidence),
            *_routers(evidence),
            *_identical(evidence),
            *_unrelated(evidence),
            *_shapes_of_change(evidence),
        ]
    )


def _routers(evidence: Evidence) -> Iterator[Finding]:
    for router in evidence.routers:
        share = router.moved / router.rows
        if share > PERMUTED:
            text = (
                f"{router.model} seems to number its experts differently: {router.moved} of "
                f"{router.rows} rows of its routers are nearest to another number (most in "
                f"{router.example}). Experts are merged by number."
            )
            limit = f"more than {PERMUTED:.0%} of router rows nearest to another number"
            yield Finding("routers", (router.model,), text, limit, True)


def _mismatches(evidence: Evidence) -> Iterator[Finding]:
    if evidence.problems:
        count = len(evidence.problems)
        text = (
            f"These models cannot be merged as they are: {count} problem{'s' * (count != 1)}. "
            "What follows compares the tensors that fit."
            if evidence.total
            else "The weights of these models cannot be compared: no tensor is in all of them with "
            "the same name and shape, or they are quantised."
        )
        yield Finding("mismatch", evidence.models, text, "names and shapes must be equal", True)
    for tokenizer in evidence.tokenizers:
        if tokenizer.added and not (tokenizer.missing or tokenizer.renumbered):
            text = (
                f"{tokenizer.model} adds {tokenizer.added:,} tokens to the vocabulary: their rows "
                "mean something in this model alone."
            )
            yield Finding("added_tokens", (tokenizer.model,), text, "token by token")
        elif tokenizer.tokens_differ:
            text = (
                f"{tokenizer.model} has another vocabulary: {tokenizer.missing:,} tokens missing, "
                f"{tokenizer.added:,} added, {tokenizer.renumbered:,} with another number. Rows of "
                "its embedding mean other tokens."
            )
            yield Finding("vocabulary", (tokenizer.model,), text, "token by token", True)


def _identical(evidence: Evidence) -> Iterator[Finding]:
    total = evidence.total
    if total is None:
        return
    scope = "" if not evidence.problems else " on every tensor that was compared"
    for i, j, equal in pairs(total.equal):
        if equal == 1.0:
            names = evidence.models[i], evidence.models[j]
            text = f"{names[0]} and {names[1]} are the same model{scope}: every weight is equal."
            yield Finding("identical", names, text, "all elements equal", True)
    for name, unchanged in zip(evidence.models, total.unchanged or (), strict=False):
        if unchanged == 1.0:
            text = f"{name} equals the base{scope}: every weight is the base's."
            yield Finding("equals_base", (name,), text, "all elements equal", True)


def _unrelated(evidence: Evidence) -> Iterator[Finding]:
    total = evidence.total
    if total is None:
        return
    if total.relative_norm is None or total.base_cosine is None:
        limit = f"cosine of weights below {UNRELATED_COSINE}"
        for i, j, cosine in pairs(total.cosine):
            if cosine < UNRELATED_COSINE:
                a, b = evidence.models[i], evidence.models[j]
                text = (
                    f"{a} and {b} do not look like fine-tunes of one base: the cosine of their "
                    f"weights is {cosine:.3f}. An average of them is unlikely to work."
                )
                yield Finding("unrelated", (a, b), text, limit, True)
        return
    distances = zip(evidence.models, total.relative_norm, total.base_cosine, strict=True)
    for name, norm, likeness in distances:
        if norm is None or likeness is None:
            continue
        if likeness < UNRELATED_COSINE:
            text = (
                f"{name} does not look like a fine-tune of {evidence.base}: the cosine of their "
                f"weights is {likeness:.3f}, and it is {100 * norm:.3g} % of the base's norm away."
            )
            limit = f"cosine of weights below {UNRELATED_COSINE}"
            yield Finding("unrelated", (name,), text, limit, True)
        elif norm > FAR:
            text = (
                f"{name} has moved far: ‖δ‖/‖θ₀‖ is {100 * norm:.3g} %. It looks like long "
                "continued training, or like a fine-tune of another base."
            )
            yield Finding("far", (name,), text, f"‖δ‖/‖θ₀‖ above {100 * FAR:g} %", True)


def _shapes_of_change(evidence: Evidence) -> Iterator[Finding]:
    """Sparse changes, low-rank changes, and changes much larger than the others."""
    total, sparsity = evidence.total, evidence.sparsity
    if total is None or total.relative_norm is None or sparsity is None:
        return
    for s, name in enumerate(evidence.models):
        share, norm = sparsity[s], total.relative_norm[s]
        if share is None or norm is None:  # nothing changed
            continue
        step = (total.one_step or ())[s]
        steps = "no" if step is None else f"{100 * step:.3g} %"
        if share >= RL_UNCHANGED and norm <= RL_NORM:
            text = (
                f"{name} looks like reinforcement learning: {100 * share:.3g} % of the weights in "
                f"the tensors it touched are unchanged, ‖δ‖/‖θ₀‖ is {100 * norm:.3g} %, and "
                f"{steps} of the changes are one step of bfloat16 or less. A short "
                "fine-tune with a small learning rate, stored in bfloat16, looks the same."
            )
            limit = (
                f"unchanged at least {100 * RL_UNCHANGED:g} %, ‖δ‖/‖θ₀‖ at most "
                f"{100 * RL_NORM:g} %; {_RL}"
            )
            yield Finding("rl_like", (name,), text, limit)
        elif share >= RL_UNCHANGED:
            text = (
                f"{name} changes few weights: {100 * share:.3g} % in the tensors it touched are "
                f"the base's, yet ‖δ‖/‖θ₀‖ is {100 * norm:.3g} %. It looks pruned or masked."
            )
            yield Finding("sparse", (name,), text, f"unchanged at least {100 * RL_UNCHANGED:g} %")
        rank = rank_share(evidence.spectra, s)
        if rank is not None and rank <= LOW_RANK:
            text = (
                f"{name} looks like a merged LoRA: in the sampled matrices "
                f"{100 * rank:.3g} % of the directions (median) hold 99 % of the change."
            )
            limit = f"directions that hold 99 %, at most {100 * LOW_RANK:g} %"
            yield Finding("low_rank", (name,), text, limit)
        untouched = [kind.name for kind in evidence.kinds if (kind.unchanged or ())[s] == 1.0]
        if untouched:
            text = f"{name} left these as the base has them: {', '.join(untouched)}."
            yield Finding("untouched", (name,), text, "all elements equal")
    yield from _louder(evidence.models, total.relative_norm)
    yield from _concentrated(evidence, total)


def _louder(models: Sequence[str], norms: Sequence[float | None]) -> Iterator[Finding]:
    moved = sorted((norm, name) for name, norm in zip(models, norms, strict=True) if norm)
    if len(moved) > 1 and moved[-1][0] >= LOUDER * moved[0][0]:
        (low, quiet), (high, loud) = moved[0], moved[-1]
        text = (
            f"{loud} moved {high / low:.2g} times as far as {quiet} ({100 * high:.3g} % and "
            f"{100 * low:.3g} % of the base's norm): with equal weights it would decide most."
        )
        yield Finding("louder", (loud,), text, f"ratio of the norms at least {LOUDER:g}")


def _concentrated(evidence: Evidence, total: Measures) -> Iterator[Finding]:
    """An embedding or head that holds most of the change, and so dominates the totals."""
    for kind in evidence.kinds:
        if kind.name not in ("embedding", "head"):
            continue
        shares = {
            name: (part / total_norm) ** 2
            for name, part, total_norm in zip(evidence.models, kind.norm, total.norm, strict=True)
            if part and total_norm and (part / total_norm) ** 2 >= CONCENTRATED
        }
        if shares:
            share = ", ".join(f"{name} {100 * value:.3g} %" for name, value in shares.items())
            text = (
                f"The {kind.name} holds most of the squared change ({share}), in "
                f"{100 * kind.count / total.count:.3g} % of the elements. Numbers over the whole "
                f"model mostly describe the {kind.name}: look at the layers, too."
            )
            limit = f"share of ‖δ‖² at least {100 * CONCENTRATED:g} %"
            yield Finding("concentrated", tuple(shares), text, limit)


def rank_share(spectra: Sequence[Spectrum], source: int) -> float | None:
    """The median share of directions that hold 99 % of a source's change."""
    shares = [
        rank / min(spectrum.rows, spectrum.columns)
        for spectrum in spectra
        if (rank := spectrum.rank_99[source]) is not None
    ]
    return median(shares) if shares else None
