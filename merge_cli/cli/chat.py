"""`merge-cli chat`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from merge_cli.cli.help import RESOURCES
from merge_cli.cli.options import DeviceOption, ModelMemoryOption, ThreadsOption, switch
from merge_cli.errors import UsageError

SAMPLING = "Sampling"


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The model to talk to: a folder or a Hub id, also BASE+ADAPTER."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Show this model's answers, too, side by side."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Answer every prompt of FILE instead: one in each line, or JSON lines "
            "with prompt or messages.",
        ),
    ] = None,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="Begin the conversation with this system message.")
    ] = "",
    no_template: Annotated[
        bool,
        switch("--no-template", "Continue each line as text, without the chat template."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --prompts: print a line of JSON for each.")
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Vary answers: 0 takes the likeliest token, 0.7 is usual for talking.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Draw from the likeliest tokens of this total probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    max_tokens: Annotated[
        int,
        typer.Option(metavar="N", help="Tokens of an answer at most.", rich_help_panel=SAMPLING),
    ] = 256,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="The same seed gives the same answers.", rich_help_panel=SAMPLING
        ),
    ] = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Run the model in auto, float32, bfloat16 or float16.",
            rich_help_panel=RESOURCES,
        ),
    ] = "auto",
    max_memory: ModelMemoryOption = None,
) -> None:
    """Talk to a model, or to two side by side; or answer a file of prompts."""
    from merge_cli import console
    from merge_cli.chat.answers import Sampling
    from merge_cli.chat.models import LoadOptions, loaded, open_models
    from merge_cli.chat.prompts import answers, read_prompts, tokens_of
    from merge_cli.evaluation.spec import DTYPES
    from merge_cli.system.machine import parse_size, torch_threads

    sampling = Sampling(temperature, top_p, max_tokens, seed)
    if as_json and prompts is None:
        raise UsageError("--json needs --prompts FILE")
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"--dtype must be auto, {', '.join(DTYPES)} (got '{dtype}')")
    memory = parse_size(max_memory, "--max-memory") if max_memory else None
    rows = read_prompts(prompts) if prompts is not None else []
    screen = console.Screen()
    names = [model, *([against] if against is not None else [])]
    screen.say(f"loading {' and '.join(names)}")
    opened = open_models(names)
    for source in opened:
        talk = source.conversation(template=not no_template, system=system)
        if prompts is not None:
            tokens_of(rows, talk, sampling, prompts)
    labels = [source.label for source in opened]
    options = LoadOptions(device, dtype, memory)
    with torch_threads(threads), ExitStack() as stack:
        with screen.progress() as on_progress:
            models = stack.enter_context(loaded(opened, options, on_progress))
        talks = [
            source.conversation(template=not no_template, system=system, live=live)
            for source, live in zip(opened, models, strict=True)
        ]
        if prompts is None:
            screen.chat(models, talks, sampling)
            return
        tokens = [tokens_of(rows, talk, sampling, prompts) for talk in talks]
        labels = [talk.label for talk in talks]
        for prompt, row in zip(rows, answers(tokens, models, sampling), strict=True):
            screen.answers(prompt, labels, row, as_json=as_json)
