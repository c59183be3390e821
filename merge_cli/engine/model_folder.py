"""Which files and folders a model's folder has: what a merge may replace."""

from __future__ import annotations

import os
from pathlib import Path

from merge_cli.checkpoint.auxiliary_files import is_companion, is_weight
from merge_cli.checkpoint.components import PIPELINE
from merge_cli.checkpoint.statistics import is_statistics
from merge_cli.errors import UsageError
from merge_cli.recipe.reference import STAGES
from merge_cli.system.raw_io import write_error

# A folder with one of these, or with weights, is a model's.
_SIGNS = ("merge_recipe.yaml", "merge_report.json", "adapter_config.json", PIPELINE, "modules.json")
# What lies in the folders of a pipeline and of sentence-transformers, and in those of exports.
_INSIDE = (".json", ".txt", ".model", ".jinja", ".md", ".yaml")
# Beside the weights, besides companions and weights: what programs and people's repositories put
# there. Settings and results of training, the card and its licence, code of the model's own.
_ENDINGS = (".json", ".md", ".model", ".py")
_ALSO = (
    "merge_recipe.yaml",
    "best_recipe.yaml",
    "merge_report.html",
    "search_journal.jsonl",
    ".gitattributes",
)
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_HINT = "Choose another folder, or remove it yourself."


def refuse_foreign(target: Path) -> None:
    """Raise if a folder is no model, or holds a file or a folder that is no part of one.

    Raises:
        UsageError: says what is in it.
    """
    try:
        entries = sorted(target.iterdir())
        if not any(path.name in _SIGNS or _holds_model(path) for path in entries):
            message = "the output exists and is not a model: it will not be replaced"
            raise UsageError(message, where=str(target), hint=_HINT)
        for path in entries:
            if path.is_symlink():  # goes alone: what it leads to stays
                continue
            if not (_is_part(path) if path.is_dir() else _is_model_file(path.name)):
                name = f"{path.name}/" if path.is_dir() else path.name
                message = f"the output holds {name}, which is no part of a model: "
                raise UsageError(message + "it will not be replaced", where=str(target), hint=_HINT)
    except OSError as error:
        raise write_error(error, target) from error


def _holds_model(path: Path) -> bool:
    """Whether a file is weights of a model; statistics of models are stored alike."""
    return is_weight(path.name) and not (path.is_file() and is_statistics(path))


def _is_part(folder: Path) -> bool:
    """Whether a folder inside a model's holds nothing but what models have in such folders.

    What stages bring has a folder for each stage.
    """
    return all(
        (not folders or folder.name == STAGES)
        and all(_belongs(name) or name in _ALSO for name in files)
        for _, folders, files in os.walk(folder)
    )


def _is_model_file(name: str) -> bool:
    """Whether models have a file of that name beside their weights."""
    is_model_file = is_weight(name) or is_companion(name) or name in _ALSO
    return is_model_file or name.endswith(_ENDINGS) or name.upper().startswith(_LEGAL)


def _belongs(name: str) -> bool:
    return is_weight(name) or is_companion(name) or name.endswith(_INSIDE)
