"""The questions of `merge-cli init` on a terminal, asked again until the answer is valid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.prompt import Confirm, Prompt

from merge_cli.errors import MergeCliError
from merge_cli.system.terminal import fold_comments

_YES_NO = ("y", "yes", "n", "no")  # no names of files


class Questions:
    """Asks questions on a console.

    Args:
        answers: the stream of answers; None is the keyboard.
        check: raises a MergeCliError for a model that cannot be opened.
    """

    def __init__(
        self, console: Console, check: Callable[[str], object], answers: TextIO | None = None
    ) -> None:
        self._console, self._check, self._answers = console, check, answers

    def base(self) -> str | None:
        """The base model; None where there is none."""
        self._console.print("A model is a folder, or organisation/name on the Hub.")
        return self._model("The base, from which the others were made (empty: unknown)") or None

    def models(self, base: str | None) -> list[str]:
        """The models to merge: at least one with a base, two without."""
        chosen: list[str] = []
        required = 1 if base else 2
        while True:
            enough = len(chosen) >= required
            more = " (empty: no more)" if enough else ""
            name = self._model(f"Model {len(chosen) + 1}{more}")
            if name and name in (*chosen, base):
                self._console.print("That model is in the list already.")
            elif name:
                chosen.append(name)
            elif enough:
                return chosen

    def method(self, proposed: str, names: Sequence[str]) -> str:
        """The method; the proposed one unless another is named."""
        return Prompt.ask(
            "Method",
            console=self._console,
            default=proposed,
            choices=list(names),
            show_choices=False,
            stream=self._answers,
        )

    def path(self, proposed: Path) -> Path:
        """The path of the recipe."""
        while True:
            answer = Prompt.ask(
                "Write it to (a file)", console=self._console, default=str(proposed),
                stream=self._answers,
            )  # fmt: skip
            if answer.lower() not in _YES_NO:
                return Path(answer)
            self._console.print(f"Press Enter for {proposed}, or type the name of a file.")

    def confirm(self, question: str) -> bool:
        """Ask for confirmation; the default is yes."""
        return Confirm.ask(question, console=self._console, default=True, stream=self._answers)

    def show(self, text: str) -> None:
        """Show a recipe before it is written."""
        shown = text if self._console.soft_wrap else fold_comments(text, self._console.width)
        self._console.print(f"\n{shown}", markup=False, highlight=False, soft_wrap=True)

    def say(self, error: MergeCliError) -> None:
        """Print why an answer is invalid."""
        self._console.print(f"[red]{escape(str(error))}[/red]")

    def _model(self, question: str) -> str:
        while True:
            name = Prompt.ask(
                question,
                console=self._console,
                default="",
                show_default=False,
                stream=self._answers,
            ).strip()
            try:
                if name:
                    self._check(name)
            except MergeCliError as error:
                self.say(error)
            else:
                return name
