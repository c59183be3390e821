"""A conversation in the terminal: one model's answer as it is written, or two side by side."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from merge_cli.chat.answers import Answer, Sampling, answer
from merge_cli.chat.conversation import Conversation
from merge_cli.chat.prompts import Prompt
from merge_cli.console.plain import plain, print_json
from merge_cli.errors import MergeCliError
from merge_cli.evaluation.live import LiveModel

HELP = "/reset forgets the conversation, /quit ends it; Ctrl-C stops an answer, then the program."
_SIDE_BY_SIDE = 60  # columns of a terminal that has room for two answers
_QUESTION = "you> "


class ChatScreen:
    """Questions from the keyboard, or from a pipe, and the models' answers.

    Args:
        models: one or two, each with its conversation.
        out: where answers go; what is said about them goes to `err`.
    """

    def __init__(
        self,
        models: Sequence[tuple[LiveModel, Conversation]],
        sampling: Sampling,
        out: Console,
        err: Console,
    ) -> None:
        self._models, self._sampling, self._out, self._err = models, sampling, out, err
        self._labels = [talk.label for _, talk in models]

    def run(self) -> None:
        """Answer until the user ends it.

        Raises:
            KeyboardInterrupt: Ctrl-C while no answer is written.
        """
        for _, talk in self._models:
            if not talk.has_history:
                self._say(f"{talk.label} continues text: each line stands by itself.")
        if sys.stdin.isatty():
            self._say(HELP)
        for question in questions():
            command = question.strip()
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                for _, talk in self._models:
                    talk.reset()
                self._say("The conversation begins anew.")
            elif command.startswith("/") and not command.startswith("//"):
                self._say(HELP)
            elif command:
                self._answer(question.removeprefix("/") if command.startswith("//") else question)

    def _answer(self, question: str) -> None:
        """Ask every model; what one cannot be asked is said, and the conversation goes on."""
        prompts = []
        try:
            for _, talk in self._models:
                ids, dropped = talk.prompt(question, self._sampling)
                prompts.append(ids)
                if dropped:
                    self._say(f"{talk.label}: {dropped} of the oldest questions no longer fit")
        except MergeCliError as error:
            self._say(str(error))
            return
        wide = len(self._models) > 1 and self._out.is_terminal and self._out.width >= _SIDE_BY_SIDE
        with stop_on_interrupt() as is_stopped:
            written = (self._in_columns if wide else self._in_turn)(prompts, is_stopped)
        for (_, talk), text in zip(self._models, written, strict=True):
            talk.add(question, text)

    def _in_turn(
        self, prompts: Sequence[Sequence[int]], is_stopped: Callable[[], bool]
    ) -> list[str]:
        """One answer below the other, each as it is written."""
        texts = []
        for (live, talk), ids in zip(self._models, prompts, strict=True):
            if len(self._models) > 1:
                self._out.print(f"[bold]{escape(talk.label)}>[/bold]", end=" ", soft_wrap=True)
            result = self._ask(live, talk, ids, is_stopped, _write)
            self._out.print()
            self._explain(talk.label, result)
            texts.append(result.text)
        return texts

    def _in_columns(
        self, prompts: Sequence[Sequence[int]], is_stopped: Callable[[], bool]
    ) -> list[str]:
        """Answers side by side, each column filled as its model writes."""
        texts = [""] * len(self._models)
        results = []
        with Live(console=self._out, transient=True, auto_refresh=False) as view:
            for i, ((live, talk), ids) in enumerate(zip(self._models, prompts, strict=True)):

                def grow(text: str, i: int = i) -> None:
                    texts[i] += text
                    view.update(self._columns(texts), refresh=True)

                results.append(self._ask(live, talk, ids, is_stopped, grow))
        texts = [result.text for result in results]
        self._out.print(self._columns(texts))
        for label, result in zip(self._labels, results, strict=True):
            self._explain(label, result)
        return texts

    def _ask(
        self,
        live: LiveModel,
        talk: Conversation,
        ids: Sequence[int],
        is_stopped: Callable[[], bool],
        on_text: Callable[[str], None],
    ) -> Answer:
        return answer(
            live,
            ids,
            self._sampling,
            turn=talk.answered,
            on_text=on_text,
            is_stopped=is_stopped,
        )

    def _columns(self, texts: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold", expand=True, padding=(0, 2))
        for label in self._labels:
            table.add_column(escape(label), ratio=1, overflow="fold")
        table.add_row(*(escape(text.strip()) for text in texts))
        return table

    def _explain(self, label: str, result: Answer) -> None:
        if result.ended == "length":
            self._say(f"{label}: stopped after {result.tokens:,} tokens (--max-tokens)")
        elif result.ended == "stopped":
            self._say(f"{label}: stopped")

    def _say(self, line: str) -> None:
        self._err.print(f"[dim]{escape(line)}[/dim]")


def questions() -> Iterator[str]:
    """Lines from the keyboard, with a prompt and a history to edit, or from a pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):  # not everywhere; then without arrow keys
        import readline  # noqa: F401  # it changes what `input` does
    while True:
        try:
            line = input(_QUESTION)
        except EOFError:
            print()
            return
        yield line


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """While an answer is written, the first Ctrl-C stops it; a second one raises."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


def print_row(
    out: Console,
    prompt: Prompt,
    labels: Sequence[str],
    row: Sequence[Answer],
    *,
    as_json: bool,
) -> None:
    """One prompt of a file with its answers: a line of JSON, or text to read."""
    if as_json:
        asked: dict[str, Any] = (
            {"messages": list(prompt.messages)} if prompt.messages else {"prompt": prompt.text}
        )
        answers = {
            label: {"text": result.text, "tokens": result.tokens, "ended": result.ended}
            for label, result in zip(labels, row, strict=True)
        }
        print_json(
            json.dumps({"line": prompt.line, **asked, "answers": answers}, ensure_ascii=False)
        )
        return
    question = prompt.messages[-1]["content"] if prompt.messages else prompt.text
    out.print(f"[bold]{prompt.line}>[/bold] {escape(question)}", soft_wrap=True)
    for label, result in zip(labels, row, strict=True):
        name = f"[bold]{escape(label)}>[/bold] " if len(labels) > 1 else ""
        out.print(f"{name}{escape(result.text.strip())}", soft_wrap=True)


def _write(text: str) -> None:
    print(plain(text), end="", flush=True)
