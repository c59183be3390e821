"""Multiple choice: which continuation does the model find likeliest?

Tokens, spaces and normalisation are those of the Language Model Evaluation Harness, so that the
accuracies are the same: prompt and choice are tokenised together, a prompt's trailing spaces
belong to the choice, `accuracy_norm` divides a choice's log-likelihood by its characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from merge_cli.evaluation.forward import Window, add_up, forward
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evaluation.rows import Row, read_rows, token_ids
from merge_cli.evaluation.task import DataTask, Tell, option


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
    version = 2

    delimiter: str = option(" ", "what stands between the prompt and a choice")

    def score(self, live: LiveModel, tell: Tell) -> TaskResult:
        import torch

        questions = [_question(row) for row in self.sample(read_rows(self.data), live.seed)]
        asked = [(q, choice) for q in questions for choice in q.choices]
        items = [
            _window(i, q, self.delimiter + choice, live) for i, (q, choice) in enumerate(asked)
        ]
        sums = torch.zeros(len(items), dtype=torch.float64)
        for batch in forward(live, items, tell):
            losses = torch.nn.functional.cross_entropy(
                batch.logits, batch.targets, reduction="none"
            )
            sums -= add_up(losses, batch.examples, len(items))
        right, right_norm, nats, examples = [], [], [], []
        start = 0
        for q in questions:
            found = sums[start : start + len(q.choices)].tolist()
            start += len(q.choices)
            best = max(range(len(found)), key=lambda i: found[i])
            norms = [value / len(choice) for value, choice in zip(found, q.choices, strict=True)]
            best_norm = max(range(len(norms)), key=lambda i: norms[i])
            right.append(float(best == q.answer))
            right_norm.append(float(best_norm == q.answer))
            nats.append(-found[q.answer])
            examples.append({"line": q.row.line, "answer": q.answer, "chosen": best,
                             "chosen_norm": best_norm, "log_likelihoods": found})  # fmt: skip
        ones = [1.0] * len(questions)
        metrics = {
            "accuracy": Metric("accuracy", "of questions", "higher", right, ones),
            "accuracy_norm": Metric("accuracy_norm", "of questions", "higher", right_norm, ones),
            "loss": Metric("loss", "nats per right choice", "lower", nats, ones),
        }
        return TaskResult(self.name, self.kind, metrics, examples)


def _question(row: Row) -> _Question:
    row.text("prompt")
    choices = row.fields.get("choices")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise row.wrong(f"needs 'choices', a list of at least two texts (got {choices!r})")
    answer = row.fields.get("answer")
    if isinstance(answer, str):
        letter = ord(answer.upper()) - ord("A") if re.fullmatch("[A-Za-z]", answer) else -1
        answer = choices.index(answer) if answer in choices else letter
    if type(answer) is not int or not 0 <= answer < len(choices):
        got = row.fields.get("answer")
        raise row.wrong(f"'answer' is none of the {len(choices)} choices (got {got!r})")
    return _Question(row, choices, answer)


def _window(number: int, question: _Question, choice: str, live: LiveModel) -> Window:
    prompt = question.row.text("prompt")
    bare = prompt.rstrip()
    if bare:
        before = _ids(bare, live)
        whole = _ids(bare + prompt[len(bare) :] + choice, live)
    else:
        before = _start(question, live)
        own = token_ids(prompt + choice, live.tokenizer)
        whole = own if own[:1] == before else [*before, *own]
    # One more than the context: the last token is predicted, and not fed.
    ids = whole[-live.max_length - 1 :]
    first = max(1, len(before) - (len(whole) - len(ids)))
    if first >= len(ids):
        raise question.row.wrong(f"the choice {choice!r} is no token of its own after its prompt")
    return Window(number, ids, first)


def _ids(text: str, live: LiveModel) -> list[int]:
    """With the special tokens that this tokenizer puts around a text, but not twice."""
    own = live.tokenizer.bos_token
    special = not (own and text.startswith(own))
    return list(live.tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _start(question: _Question, live: LiveModel) -> list[Any]:
    """What an empty prompt leaves to predict from."""
    tokenizer = live.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise question.row.wrong("an empty prompt, and the tokenizer has no token to start with")
