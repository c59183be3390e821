"""The earlier stages of a recipe with several documents, in recipes, cards and reports.

Each stage's folder has its resolved recipe and its report. A result carries the recipes of all
its stages, so that running its merge_recipe.yaml runs them again; and the models that were made
for it on the way, which need more than a recipe to be made again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.errors import RecipeError
from merge_cli.methods.registry import get_method
from merge_cli.recipe.dump import Locate, data_from, dump_recipe, folder_from, path_from
from merge_cli.recipe.load import read_recipe
from merge_cli.recipe.reference import (
    HUB,
    STAGES,
    ModelRef,
    local_folder,
    parse_reference,
    stage_folder,
)
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.statistics import FOLDER
from merge_cli.report.numbers import duration, size
from merge_cli.report.page import Section, Table, code, listing, section
from merge_cli.system.raw_io import write_error


class Stages:
    """The stages of a result.

    Args:
        folders: of the stages' results, by name, in the order of the stages.
        kept: folders that belong into the result's, by their names there: models, statistics.

    Attributes:
        names: of the stages.
    """

    def __init__(
        self, folders: Mapping[str, Path], kept: Mapping[str, Path] = MappingProxyType({})
    ) -> None:
        self._folders, self._kept = dict(folders), dict(kept)
        self.names = tuple(folders)

    def named(self, locate: Locate) -> Locate:
        """`locate`, except that a stage's result is called by the stage's name.

        Models that are kept in the result are named as they lie there.
        """
        names = {str(folder): name for name, folder in self._folders.items()}
        names |= {str(folder): f"./{name}" for name, folder in self._kept.items()}

        def find(model: ModelRef) -> str:
            stage = model.path if model.path in self._folders else names.get(model.path)
            return stage or locate(model)

        return find

    def kept_name(self, label: str) -> str:
        """How the result names a model that it keeps; any other by its own label."""
        names = {str(folder): f"./{name}" for name, folder in self._kept.items()}
        return names.get(label, label)

    def by_name(self, value: Any) -> Any:
        """JSON, or a text, in which a stage goes by its name: its folder is gone afterwards."""
        # `first` is how the path of `first-b` begins: the longer one comes first.
        folders = sorted(self._folders.items(), key=lambda item: -len(str(item[1])))
        names = {str(folder): name for name, folder in folders}

        def renamed(part: Any) -> Any:
            if isinstance(part, str):
                for path, name in names.items():
                    part = part.replace(path, name) if path in part else part
                return part
            if isinstance(part, dict):
                return {renamed(key): renamed(item) for key, item in part.items()}
            return [renamed(item) for item in part] if isinstance(part, list | tuple) else part

        return renamed(value) if names else value

    def complete(self, text: str, target: Path) -> str:
        """A recipe that lies in `target`, with the documents of stages whose folders it names."""
        folders = sorted(self._folders.items(), key=lambda item: -len(str(item[1])))
        paths = {os.path.relpath(folder, target): name for name, folder in folders}
        text = str(self.by_name(text))  # its first line may say what the best one is
        if not any(path in text for path in paths):
            return text
        for path, name in paths.items():
            text = text.replace(path, name)
        return "---\n".join([*self.documents(target), text])

    def kept_folder(self, word: str, recipe_folder: Path, target: Path) -> str:
        """How a recipe in `target` names a folder of statistics, as another one names it."""
        name = self.kept_name(word)
        return folder_from(target, recipe_folder)(word) if name == word else name

    def documents(self, target: Path | None) -> list[str]:
        """Each stage's resolved recipe as YAML.

        Args:
            target: the folder that paths are relative to, with copies of learned coefficients; None
                for a text to show: models by the last part of their paths, no fingerprints.
        """
        texts = []
        for name, recipe in self._recipes.items():
            folder = recipe.folder
            locate = self.named(path_from(target, folder, {}) if target else public_name(folder))
            locate = self._where_kept(folder, locate)
            learned = f"./{STAGES}/{stage_folder(name)}/{FILE}" if recipe.coefficients else None
            fingerprints = recipe.inputs if target else {}
            statistics = recipe.statistics_folder
            if statistics is not None:
                statistics = self._where_statistics(name, recipe, target)
            inputs = {locate(parse_reference(k, folder)): v for k, v in fingerprints.items()}
            texts.append(
                dump_recipe(
                    recipe,
                    locate=locate,
                    defaults={},
                    inputs=inputs,
                    coefficients=learned,
                    statistics=statistics,
                    data=data_from(target, folder) if target else lambda word: Path(word).name,
                    kind=get_method(recipe.merge_method).gathers,
                )
            )
        return texts

    def _kept_of_stages(self) -> Iterator[tuple[str, Path]]:
        """Models and statistics in the stages' folders: where in the result's, and where now."""
        for name, result in self._folders.items():
            for marker in sorted((*result.glob("*/config.json"), *result.glob(f"{FOLDER}/1.*"))):
                yield f"{STAGES}/{stage_folder(name)}/{marker.parent.name}", marker.parent

    def _where_statistics(self, name: str, recipe: Recipe, target: Path | None) -> str:
        """How the result's recipe names a stage's folder of statistics."""
        word = str(recipe.statistics_folder)
        if (self._folders[name] / word).resolve() == (self._folders[name] / FOLDER).resolve():
            return f"./{STAGES}/{stage_folder(name)}/{FOLDER}"
        return folder_from(target, recipe.folder)(word) if target else Path(word).name

    def _where_kept(self, recipe_folder: Path, locate: Locate) -> Locate:
        """`locate`, except that models that stages keep are named as they lie in the result."""
        kept_paths = {folder.resolve(): path for path, folder in self._kept_of_stages()}

        def find(model: ModelRef) -> str:
            local = None if model.lora else local_folder(model.path, recipe_folder)
            path = None if local is None else kept_paths.get(local.resolve())
            return f"./{path}" if path else locate(model)

        return find

    def copy_files(self, folder: Path) -> None:
        """Copy what recipes of the result and its stages name: coefficients, models that are kept.

        Raises:
            ResourceError: it cannot be written.
        """
        for path, model in (*self._kept.items(), *self._kept_of_stages()):
            try:
                shutil.copytree(model, folder / path, dirs_exist_ok=True)
            except shutil.Error as error:
                raise write_error(_first_of(error), folder / path) from error
            except OSError as error:
                raise write_error(error, folder / path) from error
        for name, result in self._folders.items():
            if (result / FILE).exists():
                copy = folder / STAGES / stage_folder(name) / FILE
                try:
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(result / FILE, copy)
                except OSError as error:
                    raise write_error(error, copy) from error

    def records(self) -> list[dict[str, Any]]:
        """For merge_report.json: each stage's inputs, output and cost."""
        return [
            {
                "name": name,
                "method": report["recipe"]["method"],
                "inputs": report["inputs"],
                "bytes": report["output"]["bytes"],
                "dtypes": report["output"]["dtypes"],
                "notes": report["notes"],
                "seconds": report["cost"]["seconds"] + report["cost"]["survey_seconds"],
            }
            for name, report in self._reports.items()
        ]

    def source_rows(self) -> list[str]:
        """The card's rows on models that stages merge."""
        rows = []
        for name, report in self._reports.items():
            for source in report["inputs"]:
                if source["model"] in self.names:
                    continue
                parts, commit = _parts(source["model"]), source["revision"]
                model = "+".join(part if commit else Path(part).name for part in parts)
                folder = f"`{commit}`" if commit else "a local folder"
                if commit and len(parts) == 1:
                    address = f"https://huggingface.co/{model}"
                    rows.append(f"| [{model}]({address}) | merged in {name} | {folder} |")
                else:
                    rows.append(f"| `{model}` | merged in {name} | {folder} |")
        return rows

    def hub_ids(self) -> list[str]:
        """Ids of the Hub models that stages merge."""
        inputs = [source for report in self._reports.values() for source in report["inputs"]]
        return [part for source in inputs if source["revision"] for part in _parts(source["model"])]

    @cached_property
    def _reports(self) -> dict[str, Any]:
        return {
            name: json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))
            for name, folder in self._folders.items()
        }

    @cached_property
    def _recipes(self) -> dict[str, Recipe]:
        recipes = {}
        for name, folder in self._folders.items():
            recipe, problems = read_recipe(folder / "merge_recipe.yaml")
            if recipe is None or problems:
                raise RecipeError(problems)
            recipes[name] = recipe
        return recipes


def stage_sections(report: Mapping[str, Any]) -> list[Section]:
    """The page's section on stages; none where the recipe has one document."""
    if "stages" not in report:
        return []
    rows = [
        [
            code(stage["name"]),
            stage["method"],
            listing([source["model"] for source in stage["inputs"]]),
            ", ".join(stage["dtypes"]),
            size(stage["bytes"]),
            duration(stage["seconds"]),
        ]
        for stage in report["stages"]
    ]
    how = "Models that other documents of the recipe made first, in this order, to be merged here."
    heads = ("stage", "method", "of", "stored as", "size", "time")
    return [section("Stages", how, "", Table(heads, rows, right=2))]


def _first_of(error: shutil.Error) -> OSError:
    """The first of what `copytree` has collected, as texts, as the error that it was."""
    text = str(error.args[0][0][2])
    match = re.match(r"\[Errno (\d+)\] ([^:]*)", text)
    return OSError(int(match[1]), match[2]) if match else OSError(errno.EIO, text)


def _parts(label: str) -> list[str]:
    """The Hub ids, or paths, of a model and of the adapter on it."""
    return [part.partition("@")[0].removeprefix(HUB) for part in label.split("+")]


def public_name(folder: Path, names: Mapping[str, str] = MappingProxyType({})) -> Locate:
    """How cards name a model: a Hub id as it is, a local folder without its path.

    Args:
        folder: where relative paths start.
        names: names of local folders by their labels; default: the last part of the path.
    """

    def locate(model: ModelRef) -> str:
        if model.lora:
            base, adapter = (
                ModelRef(model.path, model.revision),
                ModelRef(model.lora, model.lora_revision),
            )
            return f"{locate(base)}+{locate(adapter)}"
        if local_folder(model.path, folder) is None:
            return str(model).removeprefix(HUB)
        return names.get(str(model)) or Path(model.path).name

    return locate
