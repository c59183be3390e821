"""What --overwrite may replace: a folder that is a model, an adapter or a pipeline, and no more."""

from __future__ import annotations

import os
from pathlib import Path

from merge_cli.checkpoint.components import PIPELINE
from merge_cli.checkpoint.files import is_companion, is_weight
from merge_cli.checkpoint.raw import write_error
from merge_cli.errors import UsageError

# A folder with one of these, or with weights, is a model's.
_SIGNS = ("merge_recipe.yaml", "merge_report.json", "adapter_config.json", PIPELINE,
          "modules.json")  # fmt: skip
# What lies in the folders of a pipeline and of sentence-transformers, and in those of exports.
_INSIDE = (".json", ".txt", ".model", ".jinja", ".md", ".yaml")
_HINT = "Choose another folder, or remove it yourself."


def refuse_foreign(target: Path) -> None:
    """Raise if a folder is no model, or holds a folder that is no part of one.

    Raises:
        UsageError: says what is in it.
    """
    try:
        entries = sorted(target.iterdir())
        names = [path.name for path in entries]
        if not any(name in _SIGNS or is_weight(name) for name in names):
            what = "the output exists and is not a model: it will not be replaced"
            raise UsageError(what, where=str(target), hint=_HINT)
        for path in entries:
            if path.is_dir() and not path.is_symlink() and not _is_part(path):
                what = f"the output holds {path.name}/, which is no part of a model: "
                raise UsageError(what + "it will not be replaced", where=str(target), hint=_HINT)
    except OSError as error:
        raise write_error(error, target) from error


def _is_part(folder: Path) -> bool:
    """Whether a folder inside a model's holds nothing but what models have in such folders."""
    return all(
        not folders and all(_belongs(name) for name in files)
        for _, folders, files in os.walk(folder)
    )


def _belongs(name: str) -> bool:
    return is_weight(name) or is_companion(name) or name.endswith(_INSIDE)
