"""The task `multiple_choice`: which continuation does the model find likeliest?

Tokens, spaces and normalisation are those of the Language Model Evaluation Harness, so that the
accuracies are the same: prompt and choice are tokenised together, a prompt's trailing spaces
belong to the choice, `accuracy_norm` divides a choice's log-likelihood by its characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from merge_cli.evaluation.forward import Window, summed_losses, windows
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evaluation.rows import Row, read_rows, require_known
from merge_cli.evaluation.task import DataTask, OnProgress, cut_note
from merge_cli.evaluation.tokens import Encoded, Truncate, encode_pair, fitted, own_start, too_long
from merge_cli.recipe.sections import option
from merge_cli.system.untrusted import kind_of


@dataclass(frozen=True)
class _Question:
    row: Row
    choices: list[str]
    answer: int


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(DataTask):
    """Rows of `prompt`, `choices` (a list), `answer` (an index from 0, a letter, or a choice)."""

    kind = "multiple_choice"
    metrics = ("accuracy", "accuracy_norm", "loss")
    version = 3

    delimiter: str = option(" ", "what stands between the prompt and a choice")
    truncate: Truncate = option("left", "which end of a prompt is cut to fit into the context")

    def score(self, live: LiveModel, on_progress: OnProgress) -> TaskResult:
        questions, encoded, items = self._windows(live)
        sums = -summed_losses(live, items, len(encoded), on_progress)
        right, right_norm, nats, examples = [], [], [], []
        start = 0
        for q in questions:
            likelihoods = sums[start : start + len(q.choices)].tolist()
            start += len(q.choices)
            best = max(range(len(likelihoods)), key=lambda i: likelihoods[i])
            norms = [
                value / len(choice) for value, choice in zip(likelihoods, q.choices, strict=True)
            ]
            best_norm = max(range(len(norms)), key=lambda i: norms[i])
            right.append(float(best == q.answer))
            right_norm.append(float(best_norm == q.answer))
            nats.append(-likelihoods[q.answer])
            examples.append(
                {
                    "line": q.row.line,
                    "answer": q.answer,
                    "chosen": best,
                    "chosen_norm": best_norm,
                    "log_likelihoods": likelihoods,
                }
            )
        ones = [1.0] * len(questions)
        metrics = {
            "accuracy": Metric("accuracy", "of questions", "higher", right, ones),
            "accuracy_norm": Metric("accuracy_norm", "of questions", "higher", right_norm, ones),
            "loss": Metric("loss", "nats per right choice", "lower", nats, ones),
        }
        count = sum(len(row.ids) > live.max_length + 1 for row in encoded)
        message = f"prompts with a choice are: of their prompts the {self.truncate} was cut"
        notes = cut_note(count, len(encoded), message, live.max_length)
        return TaskResult(self.name, self.kind, metrics, examples, notes=notes)

    def check_row(self, row: Row) -> None:
        _question(row)

    def check(self, live: LiveModel) -> None:
        self._windows(live)

    def _windows(self, live: LiveModel) -> tuple[list[_Question], list[Encoded], list[Window]]:
        """The questions, every prompt with a choice, and their windows."""
        questions = [_question(row) for row in self.sample(read_rows(self.data), live.seed)]
        encoded: list[Encoded] = []
        items: list[Window] = []
        # One more than the context: the last token is predicted, and is no input.
        limit = live.max_length + 1
        for q in questions:
            for choice in q.choices:
                complete = _encoded(q, self.delimiter + choice, live.tokenizer)
                require_known(q.row, complete.ids, live.tokenizer, live.entries)
                cut = fitted(complete, limit, self.truncate)
                if cut is None:
                    raise q.row.wrong(*too_long(len(complete.ids), limit))
                items += windows(len(encoded), cut.ids, cut.first, limit, limit)
                encoded.append(complete)
        return questions, encoded, items


def _question(row: Row) -> _Question:
    row.text("prompt")
    choices = row.fields.get("choices")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise row.wrong(f"needs 'choices', a list of at least two texts (got {kind_of(choices)})")
    answer = row.fields.get("answer")
    if isinstance(answer, str):
        letter = ord(answer.upper()) - ord("A") if re.fullmatch("[A-Za-z]", answer) else -1
        answer = choices.index(answer) if answer in choices else letter
    if type(answer) is not int or not 0 <= answer < len(choices):
        got = row.fields.get("answer")
        raise row.wrong(f"'answer' is not one of the {len(choices)} choices (got {kind_of(got)})")
    return _Question(row, choices, answer)


def _encoded(question: _Question, choice: str, tokenizer: Any) -> Encoded:
    """Tokens of prompt and choice; the spaces between them belong to the choice."""
    prompt = question.row.text("prompt")
    bare = prompt.rstrip()
    start = own_start(tokenizer) if bare else _start(question, tokenizer)
    encoded = encode_pair(bare, prompt[len(bare) :] + choice, tokenizer, start)
    if encoded.first >= len(encoded.ids):
        message = f"the choice {choice!r} adds no token to its prompt"
        raise question.row.wrong(message)
    return encoded


def _start(question: _Question, tokenizer: Any) -> list[int]:
    """The tokens before a choice after an empty prompt."""
    if start := own_start(tokenizer):
        return start
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [int(token)]
    raise question.row.wrong("an empty prompt, and the tokenizer has no token to start with")
