"""The other documents of a recipe, as what they have made tells of them.

Each stage's folder holds its resolved recipe and its report. A result carries the recipes of all
the stages that it is made of, so that running its merge_recipe.yaml runs them again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.errors import RecipeError
from merge_cli.methods.registry import get_method
from merge_cli.recipe.dump import Locate, data_from, dump_recipe, path_from
from merge_cli.recipe.load import read_recipe
from merge_cli.recipe.reference import HUB, ModelRef, local_folder, parse_reference, stage_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.report.page import Section, Table, code, duration, listing, section, size
from merge_cli.system.raw_io import write_error


class Stages:
    """Those that a result is made of.

    Args:
        places: the folders of their results, by name, in the order of their making.

    Attributes:
        names: theirs.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = dict(places)
        self.names = tuple(places)

    def named(self, locate: Locate) -> Locate:
        """`locate`, except that the result of a stage goes by its name."""
        folders = {str(place): name for name, place in self._places.items()}

        def find(model: ModelRef) -> str:
            known = model.path if model.path in self._places else folders.get(model.path)
            return known or locate(model)

        return find

    def documents(self, target: Path | None) -> list[str]:
        """Each stage's resolved recipe as YAML.

        Args:
            target: the folder that paths lead from, which has a copy of learned coefficients; None
                for a text that is shown: models by the last part of their paths, no fingerprints.
        """
        texts = []
        for name, recipe in self._recipes.items():
            folder = recipe.folder
            locate = self.named(path_from(target, folder, {}) if target else _last_part(folder))
            learned = f"./stages/{stage_folder(name)}/{FILE}" if recipe.coefficients else None
            pinned = recipe.inputs if target else {}
            inputs = {locate(parse_reference(k, folder)): v for k, v in pinned.items()}
            texts.append(
                dump_recipe(
                    recipe,
                    locate=locate,
                    defaults={},
                    inputs=inputs,
                    coefficients=learned,
                    data=data_from(target, folder) if target else lambda word: Path(word).name,
                    kind=get_method(recipe.merge_method).gathers,
                )
            )
        return texts

    def copy_coefficients(self, folder: Path) -> None:
        """Copy what stages have learned to where `documents` says that it is.

        Raises:
            ResourceError: it cannot be written.
        """
        for name, place in self._places.items():
            if (place / FILE).exists():
                copy = folder / "stages" / stage_folder(name) / FILE
                try:
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(place / FILE, copy)
                except OSError as error:
                    raise write_error(error, copy) from error

    def records(self) -> list[dict[str, Any]]:
        """For merge_report.json: what was made on the way, of what, at what cost."""
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
            for item in report["inputs"]:
                if item["model"] in self.names:
                    continue
                parts, commit = _parts(item["model"]), item["revision"]
                shown = "+".join(part if commit else Path(part).name for part in parts)
                place = f"`{commit}`" if commit else "a local folder"
                if commit and len(parts) == 1:
                    address = f"https://huggingface.co/{shown}"
                    rows.append(f"| [{shown}]({address}) | merged in {name} | {place} |")
                else:
                    rows.append(f"| `{shown}` | merged in {name} | {place} |")
        return rows

    def hub_ids(self) -> list[str]:
        """The Hub's models that stages were made of."""
        inputs = [one for report in self._reports.values() for one in report["inputs"]]
        return [part for item in inputs if item["revision"] for part in _parts(item["model"])]

    @cached_property
    def _reports(self) -> dict[str, Any]:
        return {
            name: json.loads((place / "merge_report.json").read_text(encoding="utf-8"))
            for name, place in self._places.items()
        }

    @cached_property
    def _recipes(self) -> dict[str, Recipe]:
        result = {}
        for name, place in self._places.items():
            recipe, problems = read_recipe(place / "merge_recipe.yaml")
            if recipe is None or problems:
                raise RecipeError(problems)
            result[name] = recipe
        return result


def stage_sections(report: Mapping[str, Any]) -> list[Section]:
    """The page's section on stages; none where the recipe has one document."""
    if "stages" not in report:
        return []
    rows = [
        [
            code(stage["name"]),
            stage["method"],
            listing([item["model"] for item in stage["inputs"]]),
            ", ".join(stage["dtypes"]),
            size(stage["bytes"]),
            duration(stage["seconds"]),
        ]
        for stage in report["stages"]
    ]
    how = "What other documents of the recipe made first, in this order, to be merged here."
    heads = ("stage", "method", "of", "stored as", "size", "time")
    return [section("Stages", how, "", Table(heads, rows, right=2))]


def _parts(label: str) -> list[str]:
    """The Hub ids, or paths, of a model and of the adapter on it."""
    return [part.partition("@")[0].removeprefix(HUB) for part in label.split("+")]


def _last_part(folder: Path) -> Locate:
    """A Hub id as it is; of a local path, its last part alone."""

    def locate(model: ModelRef) -> str:
        if model.lora:
            base, adapter = (
                ModelRef(model.path, model.revision),
                ModelRef(model.lora, model.lora_revision),
            )
            return f"{locate(base)}+{locate(adapter)}"
        local = local_folder(model.path, folder) is not None
        return Path(model.path).name if local else str(model).removeprefix(HUB)

    return locate
