"""`merge-cli schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from merge_cli.cli.options import switch
from merge_cli.errors import UsageError


def schema(
    evaluation: Annotated[
        bool, switch("--eval", "Print the schema of evaluation files instead.")
    ] = False,
    objective: Annotated[
        bool, switch("--objective", "Print the schema of a recipe's `objective:` instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes: completion and underlined mistakes in editors."""
    from merge_cli import json_schema

    if evaluation and objective:
        raise UsageError("--eval and --objective exclude each other", hint="Give one of them.")
    if evaluation:
        result = json_schema.evaluation_schema()
    elif objective:
        result = json_schema.objective_schema()
    else:
        result = json_schema.recipe_schema()
    typer.echo(json.dumps(result, indent=2))
