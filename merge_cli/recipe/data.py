"""The `data:` of a model in a recipe: files, or a data set of the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from merge_cli.recipe.forms import Text, Texts, any_of
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.sections import option, section_of


@dataclass(frozen=True)
class DataFiles(Form):
    """A file, or a list of files, that exist."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        words = [node.value] if isinstance(node.value, str) else node.plain()
        if not (isinstance(words, list) and words and all(isinstance(w, str) and w for w in words)):
            return reader.refuse_type(node, key, "must be a file or a list of files")
        for word in words:
            if local_file(word, reader.folder) is None:
                reader.refuse(node, key, f"no such file: {word}")
        return tuple(words)

    def schema(self) -> Schema:
        return Texts().schema()


@dataclass(frozen=True)
class Data:
    """Where a source's examples come from: files, or a data set of the Hub.

    Attributes:
        key: where it stands in the recipe.
    """

    files: tuple[str, ...] = option(
        (), "files of examples, relative to the recipe", form=DataFiles()
    )
    held_out: tuple[str, ...] = option(
        (), "files to measure on; default a share of the rows of `files`", form=DataFiles()
    )
    dataset: str | None = option(None, "a data set of the Hub, by its id", form=Text())
    config: str | None = option(None, "configuration of the data set", form=Text())
    split: str = option("train", "split of the data set", form=Text())
    revision: str | None = option(None, "a branch, tag or commit of it", form=Text())
    part: Literal["all", "train", "validation", "test"] = option(
        "all", "all rows, or one part of them, divided by content as auto divides them"
    )
    key: str = ""


def _data(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Data:
    given = [
        name for name in ("files", "dataset") if (child := node.value.get(name)) and child.value
    ]
    if len(given) != 1:
        reader.refuse(node, key, "give either files or a dataset", "Write `data: FILE`.")
    return Data(**values, key=key)


_EITHER = [{"required": ["files"]}, {"required": ["dataset"]}]


_DATA_SECTION = section_of(Data, _data, oneOf=_EITHER)


@dataclass(frozen=True)
class DataForm(Form):
    """A file, several, or a mapping of `files`, `held_out`, or a Hub `dataset`."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if isinstance(node.value, dict):
            return _DATA_SECTION.read(node, key, reader)
        files = DataFiles().read(node, key, reader)
        return REFUSED if files is REFUSED else Data(files=files, key=key)

    def schema(self) -> Schema:
        return any_of(*DataFiles().schema()["anyOf"], _DATA_SECTION.schema())
