"""The sources' rows in three parts by content: to learn from, to choose by, to judge by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from merge_cli.calibration.data import shown
from merge_cli.data.rows import part_of, read_data
from merge_cli.data.sequences import data_files, sequences, short_names
from merge_cli.errors import SourceError
from merge_cli.evaluation.forward import Example
from merge_cli.evaluation.rows import Row, content_of
from merge_cli.evaluation.tokens import row_start
from merge_cli.recipe.schema import Recipe

LEAST = 4  # rows of each part, of each source
# Of each source, about and at most: for every candidate of the search, every step, the last few
# steps, and the verdict.
SEARCH_TOKENS, VALIDATION_TOKENS, FINAL_TOKENS, TEST_TOKENS = 1024, 2048, 8192, 8192
_LENGTH = 512  # of a sequence; longer rows are cut

MeasuredRows = tuple[tuple[Example, ...], ...]  # the sequences of each row


@dataclass(frozen=True)
class Parts:
    """One source's rows.

    Attributes:
        name: for tables.
        counts: different rows of each part.
        search: rows to learn from, for candidates.
        validation, final: rows to choose by: for every step, and all of them for the best few.
        test: rows to judge by.
        digest: of all rows' content.
    """

    name: str
    counts: dict[str, int]
    search: MeasuredRows
    validation: MeasuredRows
    final: MeasuredRows
    test: MeasuredRows
    digest: str

    def tokens(self, part: str) -> int:
        """Tokens of a part that is measured on."""
        return sum(len(item.ids) for row in getattr(self, part) for item in row)


def load_parts(recipe: Recipe, tokenizer: Any, context: int, entries: int | None) -> list[Parts]:
    """The data of every source. A row is in the same part wherever it stands, and counts once.

    Args:
        context: tokens that the models take.
        entries: embeddings that they have.

    Raises:
        SourceError: data that cannot be read, or too few rows.
    """
    length, start = min(context, _LENGTH), row_start(tokenizer)

    def cut(rows: Iterable[Row], most: int) -> MeasuredRows:
        result: list[tuple[Example, ...]] = []
        total = 0
        for row in rows:
            cuts = tuple(sequences([row], tokenizer, length, None, start=start, entries=entries))
            size = sum(len(part.ids) for part in cuts)
            if not cuts or (result and total + size > most):
                continue
            result.append(cuts)
            total += size
        return tuple(result)

    names = short_names([str(spec.model) for spec in recipe.models])
    taken: set[bytes] = set()  # a row of two sources is measured as the first one's
    parts = []
    for spec, name in zip(recipe.models, names, strict=True):
        assert spec.data is not None, "check_recipe refuses a source without data"
        rows: dict[bytes, Row] = {}
        for row in read_data(spec.data, data_files(spec.data.files, recipe)):
            rows.setdefault(content_of(row), row)
        # By content: the order of a file's rows decides nothing.
        divided: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
        for content in sorted(rows):
            part = part_of(rows[content])
            if part == "train" or content not in taken:
                divided[part].append(rows[content])
        taken |= rows.keys()
        counts = {part: len(listed) for part, listed in divided.items()}
        if min(counts.values()) < LEAST:
            message = (
                f"has too few different rows: {counts['train']} to learn from, "
                f"{counts['validation']} to choose by and {counts['test']} to judge by, and auto "
                f"needs at least {LEAST} of each"
            )
            hint = "Give 100 rows or more for each model."
            raise SourceError(message, file=shown(spec.data), hint=hint)
        chosen = {
            "search": cut(divided["train"], SEARCH_TOKENS),
            "validation": cut(divided["validation"], VALIDATION_TOKENS),
            "final": cut(divided["validation"], FINAL_TOKENS),
            "test": cut(divided["test"], TEST_TOKENS),
        }
        if not all(chosen.values()):
            raise SourceError("has no token to measure merges on", file=shown(spec.data))
        digest = hashlib.sha256(b"".join(sorted(rows))).hexdigest()
        parts.append(Parts(name, counts, **chosen, digest=digest))
    return parts
