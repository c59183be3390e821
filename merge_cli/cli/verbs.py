"""The commands: one line of each for `--help`; the rest is imported when a command is run."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand

from merge_cli.cli.help import HelpCommand, HelpGroup


class Verb(NamedTuple):
    """A command.

    Attributes:
        panel: under which title it is listed.
        module: of `merge_cli.cli`, with a function of the command's name.
        summary: the first paragraph of that function's docstring, which a test compares.
    """

    panel: str
    module: str
    summary: str


_MERGE, _MEASURE, _PUBLISH = "Merge", "Measure", "Publish and convert"
VERBS = {
    "demo": Verb(
        _MERGE,
        "demo",
        "Try merge-cli: merge two tiny experts that come with it, and see what that gains.",
    ),
    "init": Verb(
        _MERGE,
        "init",
        "Write a first recipe: inspect the models, propose a method and give the reasons.",
    ),
    "plan": Verb(
        _MERGE,
        "run",
        "Show what a recipe would do and every problem in it, without reading weights.",
    ),
    "run": Verb(
        _MERGE, "run", "Run a recipe: write the merged model, its model card and a report."
    ),
    "methods": Verb(_MERGE, "methods", "List the merge methods, or explain one."),
    "schema": Verb(
        _MERGE,
        "schema",
        "Print the JSON Schema of recipes: completion and underlined mistakes in editors.",
    ),
    "chat": Verb(
        _MEASURE, "chat", "Talk to a model, or to two side by side; or answer a file of prompts."
    ),
    "analyze": Verb(
        _MEASURE,
        "analyze",
        "Compare models before a merge: similarity, conflicts and a suggested recipe.",
    ),
    "evaluate": Verb(
        _MEASURE,
        "evaluate",
        "Evaluate a model: loss, accuracy and exact match, with confidence intervals.",
    ),
    "compare": Verb(
        _MEASURE,
        "compare",
        "Merge and evaluate several recipes, and compare them with base, sources and baselines.",
    ),
    "push": Verb(
        _PUBLISH,
        "push",
        "Upload a merged model and its card to the Hugging Face Hub, or to a store.",
    ),
    "convert": Verb(
        _PUBLISH,
        "convert",
        "Convert pickled weights, GGUF or DCP to safetensors, or a model to GGUF.",
    ),
    "extract-lora": Verb(
        _PUBLISH,
        "extract_lora",
        "Write the change of a fine-tune as a LoRA adapter that PEFT can load.",
    ),
}


class VerbGroup(HelpGroup):
    """`merge-cli` itself. Its list of commands imports none of them."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = _Commands()
        self._lists = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self._lists and cmd_name in VERBS:
            return _line_of(cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._lists = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._lists = False


class _Commands(dict[str, Any]):
    """Commands by name, in the order of `VERBS`; each is made when it is looked up."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(VERBS))

    def __getitem__(self, name: str) -> Any:
        command = super().__getitem__(name)
        if command is None:
            command = self[name] = _load(name)
        return command

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  # dict.get would not load


def _line_of(name: str) -> TyperCommand:
    """What `--help` lists of a command."""
    verb = VERBS[name]
    return TyperCommand(name, help=verb.summary, rich_help_panel=verb.panel)


def _load(name: str) -> Any:
    """A command with its arguments and options, as typer makes them of its function."""
    verb = VERBS[name]
    function = getattr(import_module(f"merge_cli.cli.{verb.module}"), name.replace("-", "_"))
    alone = typer.Typer(add_completion=False)
    alone.command(name, cls=HelpCommand, rich_help_panel=verb.panel)(function)
    return typer.main.get_command(alone)
