"""Where rows come from: JSON lines and text (`evaluation.rows`), Parquet, data sets of the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_cli.errors import ResourceError, SourceError
from merge_cli.evaluation.rows import Row, content_of, make_row, read_rows
from merge_cli.recipe.data import Data
from merge_cli.system.paths import require_text

_FIELDS = ("text", "prompt", "completion", "messages")
VALIDATION = TEST = 0.1  # shares of the rows, about
_HINT = "pip install 'merge-cli[data]'"


def read_data(data: Data, files: Sequence[Path], *, held_out: bool = False) -> list[Row]:
    """Every row of the files, or of the Hub's data set.

    Raises:
        SourceError: unreadable, malformed (with the line), or without a row.
        ResourceError: a package that this kind of data needs is missing.
    """
    if held_out:
        return [row for path in files for row in _file_rows(path)]
    if data.dataset is not None:
        rows = _hub_rows(data)
    else:
        rows = [row for path in files for row in _file_rows(path)]
    return rows if data.part == "all" else [row for row in rows if part_of(row) == data.part]


def part_of(row: Row) -> str:
    """The part of the data that a row is in: train, validation or test.

    A function of what the row says alone, so that it is in one part wherever it stands.
    """
    share = int.from_bytes(hashlib.sha256(b"part:" + content_of(row)).digest()[:8], "big") / 2**64
    if share < VALIDATION:
        return "validation"
    return "test" if share < VALIDATION + TEST else "train"


def _file_rows(path: Path) -> list[Row]:
    if path.suffix != ".parquet":
        return read_rows(path)
    require_text(path)
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ResourceError("Parquet needs pyarrow", where=str(path), hint=_HINT) from None
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        message = f"is not a Parquet file: {_reason(error)}"
        raise SourceError(message, file=str(path)) from None
    return _rows(table.to_pylist(), path)


def _hub_rows(data: Data) -> list[Row]:
    try:
        import datasets
    except ImportError:
        message = "a data set of the Hub needs the package datasets"
        raise ResourceError(message, where=str(data.dataset), hint=_HINT) from None
    try:
        result = datasets.load_dataset(
            data.dataset, data.config, split=data.split, revision=data.revision
        )
    except (Exception, SystemExit) as error:  # whatever its readers raise: the user sees why
        message = f"the data set cannot be loaded: {_reason(error)}"
        raise SourceError(message, file=str(data.dataset)) from error
    return _rows(result, Path(str(data.dataset)))


def _reason(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rows(table: Any, path: Path) -> list[Row]:
    """Rows with those of their fields that mean something here; numbered from 1."""
    rows = [make_row(number, _known(fields), path) for number, fields in enumerate(table, start=1)]
    if not rows:
        raise SourceError("has no rows", file=str(path))
    return rows


def _known(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    texts = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    return texts or fields
