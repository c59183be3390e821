"""The task `exact_match`: compare the answer in generated text with the right one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merge_cli.checkpoint.fingerprint import file_fingerprint
from merge_cli.errors import SourceError, UsageError
from merge_cli.evaluation.chat import (
    SYSTEM_WITHOUT_CHAT,
    TemplateError,
    render_chat,
    require_template,
)
from merge_cli.evaluation.forward import batches_by_length, require_finite
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evaluation.rows import Row, content_of, listed, read_rows, require_known
from merge_cli.evaluation.task import DataTask, OnProgress, cut_note
from merge_cli.evaluation.tokens import Truncate, encode_pair, fitted, row_start, too_long
from merge_cli.recipe.forms import PathForm
from merge_cli.recipe.sections import option
from merge_cli.system.patterns import compile_pattern
from merge_cli.system.untrusted import Unreadable, is_file, kind_of


@dataclass(frozen=True, kw_only=True)
class ExactMatch(DataTask):
    """Greedy generation after `prompt`; the right answer is `answer` or in `completion`."""

    kind = "exact_match"
    metrics = ("exact_match",)
    version = 3

    extract: str = option(
        "", "regular expression of an answer; its first group, or all; default the whole text"
    )
    take: Literal["first", "last"] = option("first", "which match, where there are several")
    max_new_tokens: int = option(128, "tokens to write at most", least=1)
    stop: tuple[str, ...] = option((), "texts that end an answer")
    ignore_case: bool = option(False, "compare without case")
    truncate: Truncate = option("left", "which end of a prompt is cut to fit into the context")
    chat_template: bool = option(False, "ask with the tokenizer's chat template")
    system: str = option("", "what a conversation begins with; needs chat_template")
    fewshot: Path | None = option(
        None, "a file of rows to show with their answers before each", form=PathForm(exists=True)
    )
    num_fewshot: int | None = option(None, "use only the first N of these; default all", least=1)

    def __post_init__(self) -> None:
        if self.system and not self.chat_template:
            raise ValueError(SYSTEM_WITHOUT_CHAT)
        if self.num_fewshot and self.fewshot is None:
            raise ValueError("num_fewshot needs fewshot, a file of rows to show")
        if self.fewshot is not None and not is_file(self.fewshot):
            raise ValueError(f"fewshot: no such file: {self.fewshot}")
        try:
            compile_pattern(self.extract)
        except Unreadable as error:
            raise ValueError(f"extract {error}") from None

    def files(self) -> tuple[Path, ...]:
        return (*super().files(), *([self.fewshot] if self.fewshot is not None else []))

    def score(self, live: LiveModel, on_progress: OnProgress) -> TaskResult:
        rows, prompts, cut = self._prompts(live)
        right = [self._right(row) for row in rows]
        texts = self._generate(prompts, live, on_progress)
        answers = [self.answer(text) for text in texts]
        hits = [float(self._same(a, b)) for a, b in zip(answers, right, strict=True)]
        metrics = {
            "exact_match": Metric("exact_match", "of questions", "higher", hits, [1.0] * len(hits))
        }
        examples = [
            {"line": row.line, "correct": bool(hit), "found": answer, "answer": gold, "text": text}
            for row, hit, answer, gold, text in zip(rows, hits, answers, right, texts, strict=True)
        ]
        message = f"prompts are: their {'beginning' if self.truncate == 'left' else 'end'} was cut"
        notes = cut_note(cut, len(rows), message, live.max_length - self.max_new_tokens)
        return TaskResult(self.name, self.kind, metrics, examples, notes=notes)

    def check_row(self, row: Row) -> None:
        self._right(row)

    def check(self, live: LiveModel) -> None:
        self._prompts(live)

    def data_digest(self) -> str:
        fewshot = "" if self.fewshot is None else f" {file_fingerprint(self.fewshot)}"
        return super().data_digest() + fewshot

    def _prompts(self, live: LiveModel) -> tuple[list[Row], list[Sequence[int]], int]:
        """The rows, the tokens of their prompts, and how many prompts were cut."""
        rows = self.sample(read_rows(self.data), live.seed)
        examples = [] if self.fewshot is None else read_rows(self.fewshot)[: self.num_fewshot]
        example_contents = {content_of(row) for row in examples}
        limit = live.max_length - self.max_new_tokens
        if limit < 1:
            message = f"max_new_tokens ({self.max_new_tokens}) leaves no room for a prompt in the "
            raise SourceError(f"{message}model's {live.max_length} tokens", model=live.label)
        start = () if self.chat_template else row_start(live.tokenizer)
        prompts: list[Sequence[int]] = []
        cut = 0
        for row in rows:
            if example_contents and content_of(row) in example_contents:
                raise row.wrong("is among the rows that `fewshot` shows with their answers, too")
            encoded = encode_pair(self._prompt_text(row, examples, live), "", live.tokenizer, start)
            require_known(row, encoded.ids, live.tokenizer, live.entries)
            shortened = fitted(encoded, limit, self.truncate)
            if shortened is None:
                raise row.wrong(*too_long(len(encoded.ids), limit))
            if not shortened.ids:
                raise row.wrong("an empty prompt, and the tokenizer has no token to start with")
            prompts.append(shortened.ids)
            cut += len(shortened.ids) < len(encoded.ids)
        return rows, prompts, cut

    def _prompt_text(self, row: Row, examples: Sequence[Row], live: LiveModel) -> str:
        """The text that the model continues."""
        prompt = row.text("prompt")
        if not self.chat_template:
            return "".join(f"{_example(example)}\n\n" for example in examples) + prompt
        require_template(live.tokenizer, live.label)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for example in examples:
            messages.append({"role": "user", "content": example.text("prompt")})
            messages.append({"role": "assistant", "content": _answer(example)})
        messages.append({"role": "user", "content": prompt})
        try:
            return render_chat(live.tokenizer, messages, add_generation_prompt=True)
        except TemplateError as error:
            raise row.wrong(f"the chat template refuses it: {error}") from None

    def answer(self, text: str) -> str | None:
        """The answer in a text; None where the expression does not match."""
        stops = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        text = text[: min(stops)] if stops else text
        if not self.extract:
            return text.strip()
        pattern = compile_pattern(self.extract).fresh()
        try:
            matches = list(pattern.finditer(text))
        except Unreadable as error:
            raise UsageError(f"extract ({self.extract!r}) {error}") from None
        if not matches:
            return None
        group = matches[0 if self.take == "first" else -1].group(1 if pattern.groups else 0)
        return None if group is None else group.strip()

    def _right(self, row: Row) -> str:
        row.text("prompt")
        if "answer" in row.fields:
            return _answer_text(row).strip()
        answer = self.answer(row.text("completion"))
        if answer is None:
            raise row.wrong(f"its completion does not match extract ({self.extract!r})")
        return answer

    def _same(self, answer: str | None, right: str) -> bool:
        if answer is None:
            return False
        return answer.casefold() == right.casefold() if self.ignore_case else answer == right

    def _generate(
        self, prompts: Sequence[Sequence[int]], live: LiveModel, on_progress: OnProgress
    ) -> list[str]:
        """Greedy continuations, in the order of the prompts."""
        import torch
        from transformers import GenerationConfig

        defaults = live.net.generation_config
        eos = (
            defaults.eos_token_id
            if defaults.eos_token_id is not None
            else live.tokenizer.eos_token_id
        )
        pad = eos[0] if isinstance(eos, list) else eos
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad if pad is not None else 0,
            stop_strings=list(self.stop) or None,
        )
        texts = [""] * len(prompts)
        done = 0
        lengths = [len(prompt) + self.max_new_tokens for prompt in prompts]
        for batch in batches_by_length(lengths, live.batch_tokens):
            width = len(prompts[batch[0]])
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, number in enumerate(
                batch
            ):  # padding on the left: text is appended on the right
                ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
                mask[row, width - len(prompts[number]) :] = 1
            with torch.inference_mode(), _greedy(live.net, config):
                written = live.net.generate(
                    logits_processor=[lambda _, logits: self._finite(logits, live)],
                    input_ids=ids.to(live.input_device),
                    attention_mask=mask.to(live.input_device),
                    generation_config=config,
                    tokenizer=live.tokenizer if self.stop else None,
                )[:, width:]
            live.count(int(mask.sum()) + written.numel(), written.shape[1])
            for number, tokens in zip(batch, written.tolist(), strict=True):
                texts[number] = live.tokenizer.decode(tokens, skip_special_tokens=True)
            done += len(batch)
            on_progress(done, len(prompts))
        return texts

    @staticmethod
    def _finite(logits: Any, live: LiveModel) -> Any:
        """Check logits: of NaN the likeliest token is 0, which looks like any answer."""
        require_finite(logits.float().logsumexp(-1), live.label)
        return logits


@contextmanager
def _greedy(net: Any, config: Any) -> Iterator[None]:
    """Generate only by this config, without a model's own settings (penalties, beams)."""
    defaults = net.generation_config
    net.generation_config = config
    try:
        yield
    finally:
        net.generation_config = defaults


def _answer_text(row: Row) -> str:
    """A row's `answer`, which may be a number."""
    answer = row.fields["answer"]
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if not isinstance(answer, str) and not (number and math.isfinite(answer)):
        raise row.wrong(f"'answer' must be a text or a number (got {kind_of(answer)})")
    return row.text("answer") if isinstance(answer, str) else str(answer)


def _answer(row: Row) -> str:
    """The right answer of a few-shot row."""
    if "completion" in row.fields:
        return row.text("completion")
    if "answer" not in row.fields:
        raise row.wrong(f"needs 'completion' or 'answer' to be shown (it has {listed(row.fields)})")
    return _answer_text(row)


def _example(row: Row) -> str:
    """A few-shot row as text; before an answer a space is added, before a completion not."""
    prompt, answer = row.text("prompt"), _answer(row)
    between = "" if "completion" in row.fields or prompt[-1:].isspace() else " "
    return f"{prompt}{between}{answer}"
