"""Recipes as Python mappings, as programs and notebooks have them.

They are written as YAML and read like a file, so that a mapping and a file mean the same and every
check is one. What is wrong is named by its key alone: nobody has written the lines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from merge_cli.errors import Problem, RecipeError
from merge_cli.recipe.nodes import Node, load_nodes


class _Dumper(yaml.SafeDumper):
    """YAML without anchors: one list in two places is two lists."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def mapping_node(recipe: Mapping[str, Any]) -> Node:
    """A recipe as the tree that a file's YAML becomes, without lines and columns.

    Args:
        recipe: the keys of a recipe (docs/recipes.md); values are mappings, lists, tuples, text,
            numbers, booleans, None, and paths.

    Raises:
        RecipeError: a value of another kind, one that contains itself, one that no file may hold.
    """
    text = yaml.dump(_plain(recipe, "", ()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    try:
        (root,) = load_nodes(text, "")
    except RecipeError as error:
        problems = [replace(problem, line=0, column=0) for problem in error.problems]
        raise RecipeError(problems) from None
    return _without_positions(root)


def _without_positions(node: Node) -> Node:
    value = node.value
    if isinstance(value, dict):
        value = {key: _without_positions(child) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_without_positions(child) for child in value]
    return replace(
        node, value=value, line=0, column=0, key_positions=dict.fromkeys(node.key_positions, (0, 0))
    )


def _plain(value: Any, key: str, holders: tuple[int, ...]) -> Any:
    if id(value) in holders:
        raise RecipeError([Problem("contains itself", key)])
    inside = (*holders, id(value))
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise RecipeError([Problem(f"a key must be text (got {name!r})", key)])
        return {k: _plain(v, f"{key}.{k}" if key else k, inside) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{i}]", inside) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    kind = type(value).__name__
    raise RecipeError([Problem(f"must be plain data: text, number, list (got {kind})", key)])
