"""The questions of `merge-cli init`, on a terminal: asked again until the answer can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.prompt import Confirm, Prompt

from merge_cli.errors import MergeCliError


class Questions:
    """Asks on a console.

    Args:
        answers: where answers come from; None is the keyboard.
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
        result: list[str] = []
        least = 1 if base else 2
        while True:
            enough = len(result) >= least
            more = " (empty: no more)" if enough else ""
            name = self._model(f"Model {len(result) + 1}{more}")
            if name and name in (*result, base):
                self._console.print("That one is there already.")
            elif name:
                result.append(name)
            elif enough:
                return result

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
        """Where the recipe goes."""
        answer = Prompt.ask(
            "Write it to", console=self._console, default=str(proposed), stream=self._answers
        )
        return Path(answer)

    def agrees(self, question: str) -> bool:
        """Yes unless no."""
        return Confirm.ask(question, console=self._console, default=True, stream=self._answers)

    def show(self, text: str) -> None:
        """A recipe, before it is written."""
        self._console.print(f"\n{text}", markup=False, highlight=False, soft_wrap=True)

    def say(self, error: MergeCliError) -> None:
        """Why an answer could not be used."""
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
