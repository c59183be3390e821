"""On-policy learning: the student continues prefixes itself, and its teachers judge what it says.

    sample    the student continues the beginning of rows of this step's batch
    judge     the student becomes each source in turn, and predicts every sampled token
    learn     reverse KL(student ‖ teacher) after each sampled prefix, added to the step's loss

At each sampled prefix the divergence is exact over the same bins as the other losses (the teacher's
`top_k` tokens and all others together; `full` for the whole vocabulary), instead of estimated from
the one token that was drawn: a teacher that is at hand predicts the whole vocabulary anyway, and
single tokens make gradients of high variance. No gradient passes through the sampling, as in GKD
(arXiv:2306.13649): what the coefficients change is what follows a prefix, not which one is drawn.

Nothing of a teacher stays in memory: a step with rollouts rewrites the student once for each source
and once more to come back. What is drawn is a function of seed, step, row and coefficients, so a
run that is resumed draws the same.
"""

from __future__ import annotations

import inspect
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from merge_cli.dam.data import Dataset
from merge_cli.dam.heldout import BatchItem
from merge_cli.dam.losses import DistillationLoss
from merge_cli.dam.student import Student
from merge_cli.evaluation.forward import Example, micro_batches, padded
from merge_cli.evaluation.teachers import kept_predictions
from merge_cli.recipe.training import Rollouts

OBJECTIVE = DistillationLoss({"reverse_kl": 1.0})  # at temperature 1, whatever others train at


@dataclass(frozen=True)
class Prefix:
    """The beginning of a row, for the student to continue.

    Attributes:
        owner: number of the data set; `row` is the number of the example in it.
    """

    ids: array[int]
    owner: int
    row: int


def prefix_of(example: Example, rollouts: Rollouts, context: int) -> array[int]:
    """Where a continuation begins: after the prompt, or after the first tokens of a text.

    A prompt that leaves no room for `length` more tokens within the context is cut at its end.
    """
    count = example.first if example.first > 1 else min(rollouts.prefix, len(example.ids) - 1)
    return example.ids[: max(1, min(count, context - rollouts.length))]


class Sampler:
    """Draws continuations and has them judged.

    Args:
        top_k: of the teachers' predictions that are kept; None for the whole vocabulary.
        batch_tokens: tokens in one forward pass.
        context: tokens that the models take.
    """

    def __init__(
        self,
        student: Student,
        datasets: Sequence[Dataset],
        rollouts: Rollouts,
        *,
        seed: int,
        top_k: int | None,
        batch_tokens: int,
        context: int,
    ) -> None:
        self._student, self._datasets, self._rollouts = student, datasets, rollouts
        self._seed, self._top_k, self._context = seed, top_k, context
        self._batch_tokens = batch_tokens
        self._ends = _end_tokens(student.net)

    def items(
        self, step: int, rows: Sequence[tuple[int, int]], counts: Mapping[int, int]
    ) -> list[BatchItem]:
        """Judged continuations of a step's rows; the student has its own weights again afterwards.

        Every row counts alike, whether it ends early or not: a token's weight is one part of
        `length` tokens of all rows of its data set in this step.

        Args:
            rows: (number of the data set, number of the example) of this process.
            counts: rows of each data set in this step, of all processes.
        """
        prefixes = [
            Prefix(prefix_of(self._datasets[d].train[i], self._rollouts, self._context), d, i)
            for d, i in rows
        ]
        with _evaluating(self._student.net):
            continued = self.sample(step, prefixes)
            judged = self._judge(prefixes, continued)
        length = self._rollouts.length
        return [
            BatchItem(example, predicted, 1.0 / (counts[prefix.owner] * length), prefix.owner)
            for prefix, example, predicted in zip(prefixes, continued, judged, strict=True)
        ]

    def sample(self, step: int, prefixes: Sequence[Prefix]) -> list[Example]:
        """Each prefix with up to `length` tokens that the student has drawn, which count."""
        groups: dict[int, list[int]] = {}
        for number, prefix in enumerate(prefixes):
            groups.setdefault(len(prefix.ids), []).append(number)
        result: dict[int, Example] = {}
        for size, numbers in groups.items():
            drawn = self._continue(step, [prefixes[number] for number in numbers])
            for number, tokens in zip(numbers, drawn, strict=True):
                result[number] = Example(prefixes[number].ids + array("i", tokens), size)
        return [result[number] for number in range(len(prefixes))]

    def _continue(self, step: int, prefixes: Sequence[Prefix]) -> list[list[int]]:
        """Tokens that are drawn for prefixes of equal length, up to the end of text."""
        import torch

        net, rollouts = self._student.net, self._rollouts
        chances = [
            random.Random(f"{self._seed}:rollouts:{step}:{prefix.owner}:{prefix.row}")
            for prefix in prefixes
        ]
        ids = torch.tensor([list(prefix.ids) for prefix in prefixes], device=net.device)
        drawn: list[list[int]] = [[] for _ in prefixes]
        past, fresh, known_as = None, ids, _cache_name(net)
        with torch.no_grad():
            for _ in range(rollouts.length):
                output = net(input_ids=fresh, use_cache=True, **{known_as: past})
                past = getattr(output, known_as, None)
                logits = output.logits[:, -1].double().cpu() / rollouts.temperature
                draws = torch.tensor([[chance.random()] for chance in chances])
                chosen = _inverse(logits.softmax(-1), draws)
                for tokens, token in zip(drawn, chosen.tolist(), strict=True):
                    if not tokens or tokens[-1] not in self._ends:
                        tokens.append(token)
                if all(tokens[-1] in self._ends for tokens in drawn):
                    break
                fresh = chosen[:, None].to(net.device)
                ids = torch.cat([ids, fresh], 1)
                if past is None:  # a kind of model without a cache: it reads everything again
                    fresh = ids
        return drawn

    def _judge(
        self, prefixes: Sequence[Prefix], continued: Sequence[Example]
    ) -> list[tuple[Any, Any, Any]]:
        """The teachers' predictions of the sampled tokens, as `Predictions.of` gives them."""
        result: dict[int, tuple[Any, Any, Any]] = {}
        sources = len(next(iter(self._student.coefficients.values())).raw)
        for owner in sorted({prefix.owner for prefix in prefixes}):
            numbers = [i for i, prefix in enumerate(prefixes) if prefix.owner == owner]
            source = self._datasets[owner].source
            self._student.write_mixture(0.0, [float(i == source) for i in range(sources)])
            for group in micro_batches(numbers, continued, self._batch_tokens):
                result |= self._predictions(group, continued)
        self._student.write_all()
        return [result[number] for number in range(len(prefixes))]

    def _predictions(
        self, numbers: Sequence[int], continued: Sequence[Example]
    ) -> dict[int, tuple[Any, Any, Any]]:
        import torch

        net = self._student.net
        ids, mask, counted = padded([continued[number] for number in numbers])
        with torch.no_grad():
            logits = net(
                input_ids=ids.to(net.device), attention_mask=mask.to(net.device), use_cache=False
            ).logits
        teachers = {}
        for row, number in enumerate(numbers):
            judged = logits[row][counted[row].to(logits.device)]
            wide = judged if judged.dtype == torch.float64 else judged.float()
            k = wide.shape[-1] if self._top_k is None else self._top_k
            likeliest, logp, tail = kept_predictions(wide, k, 1.0)
            teachers[number] = likeliest.cpu(), logp.cpu(), None if tail is None else tail.cpu()
        return teachers


def rollout_bytes(rollouts: Rollouts | None, rows: int, k: int) -> int:
    """What the predictions of a step's sampled tokens take: an id and a number for each of k."""
    return 0 if rollouts is None else rows * rollouts.length * (12 * k + 4)


def _inverse(probabilities: Any, draws: Any) -> Any:
    """The token at which the cumulated probabilities pass each draw.

    Args:
        probabilities: float64 [n, vocabulary].
        draws: [n, 1] in [0, 1).

    Returns:
        int64 [n].
    """
    import torch

    cumulated = probabilities.cumsum(-1)
    # Of the whole, which may miss 1 by a rounding, so that no token beyond the last is drawn.
    token = torch.searchsorted(cumulated, draws.double() * cumulated[:, -1:], right=True)
    return token[:, 0].clamp(max=probabilities.shape[-1] - 1)


def _cache_name(net: Any) -> str:
    """What this version of transformers calls keys and values of earlier tokens."""
    return "cache" if "cache" in inspect.signature(net.forward).parameters else "past_key_values"


def _end_tokens(net: Any) -> frozenset[int]:
    """Tokens after which nothing is said."""
    ends = getattr(net.config.get_text_config(), "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list | tuple) else [ends])


@contextmanager
def _evaluating(net: Any) -> Iterator[None]:
    """Outside training mode, in which checkpointing would keep no cache."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)
