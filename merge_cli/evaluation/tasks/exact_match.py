"""Exact match: what the model writes, reduced to an answer, against the right one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from merge_cli.errors import SourceError
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evaluation.rows import Row, encode, read_rows
from merge_cli.evaluation.task import DataTask, Tell, option


@dataclass(frozen=True, kw_only=True)
class ExactMatch(DataTask):
    """Greedy generation after `prompt`; right is `answer`, or what `completion` says."""

    kind = "exact_match"
    metrics = ("exact_match",)
    version = 2

    extract: str = option(
        "", "regular expression of an answer; its first group, or all; default the whole text"
    )
    take: Literal["first", "last"] = option("first", "which match, where there are several")
    max_new_tokens: int = option(128, "tokens to write at most", least=1)
    stop: tuple[str, ...] = option((), "texts that end an answer")
    ignore_case: bool = option(False, "compare without case")

    def __post_init__(self) -> None:
        try:
            re.compile(self.extract)
        except re.error as error:
            raise ValueError(f"extract is no regular expression: {error}") from None

    def score(self, live: LiveModel, tell: Tell) -> TaskResult:
        rows = self.sample(read_rows(self.data), live.seed)
        right = [self._right(row) for row in rows]
        room = live.max_length - self.max_new_tokens
        if room < 1:
            what = f"max_new_tokens ({self.max_new_tokens}) leaves no room for a prompt in the "
            raise SourceError(f"{what}model's {live.max_length} tokens", model=live.label)
        prompts = [_prompt(row, live)[-room:] for row in rows]
        texts = self._generate(prompts, live, tell)
        found = [self.answer(text) for text in texts]
        hits = [float(self._same(a, b)) for a, b in zip(found, right, strict=True)]
        metrics = {
            "exact_match": Metric("exact_match", "of questions", "higher", hits, [1.0] * len(hits))
        }
        examples = [
            {"line": row.line, "correct": bool(hit), "found": one, "answer": gold, "text": text}
            for row, hit, one, gold, text in zip(rows, hits, found, right, texts, strict=True)
        ]
        return TaskResult(self.name, self.kind, metrics, examples)

    def answer(self, text: str) -> str | None:
        """The answer in a text; None where the expression does not match."""
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        text = text[: min(ends)] if ends else text
        if not self.extract:
            return text.strip()
        found = list(re.finditer(self.extract, text))
        if not found:
            return None
        match = found[0 if self.take == "first" else -1]
        text = match[1] if match.re.groups else match[0]
        return None if text is None else text.strip()

    def _right(self, row: Row) -> str:
        row.text("prompt")
        answer = row.fields.get("answer")
        if answer is not None and not isinstance(answer, list | dict):
            return str(answer).strip()
        found = self.answer(row.text("completion"))
        if found is None:
            raise row.wrong(f"its completion does not match extract ({self.extract!r})")
        return found

    def _same(self, found: str | None, right: str) -> bool:
        if found is None:
            return False
        return found.casefold() == right.casefold() if self.ignore_case else found == right

    def _generate(self, prompts: Sequence[Sequence[int]], live: LiveModel, tell: Tell) -> list[str]:
        """Greedy continuations, in the order of the prompts."""
        import torch
        from transformers import GenerationConfig

        own = live.net.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else live.tokenizer.eos_token_id
        pad = ends[0] if isinstance(ends, list) else ends
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=ends,
            pad_token_id=pad if pad is not None else 0,
            stop_strings=list(self.stop) or None,
        )  # fmt: skip
        texts = [""] * len(prompts)
        done = 0
        for batch in _batches(prompts, self.max_new_tokens, live.batch_tokens):
            width = len(prompts[batch[0]])
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, number in enumerate(batch):  # on the left: writing goes on at the right
                ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
                mask[row, width - len(prompts[number]) :] = 1
            with torch.inference_mode(), _plainly(live.net, config):
                written = live.net.generate(
                    input_ids=ids.to(live.net.device), attention_mask=mask.to(live.net.device),
                    generation_config=config, tokenizer=live.tokenizer if self.stop else None,
                )[:, width:]  # fmt: skip
            live.count(int(mask.sum()) + written.numel(), written.shape[1])
            for number, tokens in zip(batch, written.tolist(), strict=True):
                texts[number] = live.tokenizer.decode(tokens, skip_special_tokens=True)
            done += len(batch)
            tell(done, len(prompts))
        return texts


@contextmanager
def _plainly(net: Any, config: Any) -> Iterator[None]:
    """Greedy as it is: a model's own generation settings (penalties, beams) would fill the gaps."""
    own = net.generation_config
    net.generation_config = config
    try:
        yield
    finally:
        net.generation_config = own


def _prompt(row: Row, live: LiveModel) -> Sequence[int]:
    """The prompt's ids, as `loss` would put them before a completion."""
    fields = {"prompt": row.text("prompt"), "completion": ""}
    ids = encode(Row(row.line, fields, row.file), live.tokenizer).ids
    if not ids:
        raise row.wrong("an empty prompt, and the tokenizer has no token to start with")
    return ids


def _batches(prompts: Sequence[Sequence[Any]], new: int, tokens: int) -> list[list[int]]:
    """Numbers of prompts of like length, the longest first, within a budget of tokens."""
    found: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        last = found[-1] if found else []
        if last and (len(prompts[last[0]]) + new) * (len(last) + 1) <= tokens:
            last.append(number)
        else:
            found.append([number])
    return found
