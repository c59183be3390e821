"""Where rows come from: JSON lines and text (`evaluation.rows`), Parquet, data sets of the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_cli.errors import ResourceError, SourceError
from merge_cli.evaluation.rows import Row, make_row, read_rows
from merge_cli.recipe.training import Data

_FIELDS = ("text", "prompt", "completion", "messages")
_HINT = "pip install 'merge-cli[data]'"


def read_data(data: Data, files: Sequence[Path], *, held_out: bool = False) -> list[Row]:
    """Every row of the files, or of the Hub's data set.

    Raises:
        SourceError: unreadable, malformed (with the line), or without a row.
        ResourceError: a package that this kind of data needs is missing.
    """
    if data.dataset is not None and not held_out:
        return _hub_rows(data)
    return [row for path in files for row in _file_rows(path)]


def _file_rows(path: Path) -> list[Row]:
    if path.suffix != ".parquet":
        return read_rows(path)
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ResourceError("Parquet needs pyarrow", where=str(path), hint=_HINT) from None
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        what = f"is not a Parquet file: {str(error).splitlines()[0]}"
        raise SourceError(what, file=str(path)) from None
    return _rows(table.to_pylist(), path)


def _hub_rows(data: Data) -> list[Row]:
    try:
        import datasets
    except ImportError:
        what = "a data set of the Hub needs the package datasets"
        raise ResourceError(what, where=str(data.dataset), hint=_HINT) from None
    try:
        found = datasets.load_dataset(
            data.dataset, data.config, split=data.split, revision=data.revision
        )
    except Exception as error:  # whatever its readers raise: the reason is the user's to see
        what = f"the data set cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise SourceError(what, file=str(data.dataset)) from error
    return _rows(found, Path(str(data.dataset)))


def _rows(found: Any, path: Path) -> list[Row]:
    """Rows with those of their fields that mean something here; numbered from 1."""
    rows = [make_row(number, _known(fields), path) for number, fields in enumerate(found, start=1)]
    if not rows:
        raise SourceError("has no rows", file=str(path))
    return rows


def _known(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    known = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    return known or fields
