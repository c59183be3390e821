"""From which row of which model each row of the output comes, for every source.

A model that lacks a token gets, in this order: the row that the recipe names; the base's row; the
row of the only model that has the token; the mean of the rows of all models that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from merge_cli.checkpoint.permuted_rows import ZERO, SourceRows
from merge_cli.errors import Problem
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import TokenRule

Key = str | int  # a token, or the number of a row without a token
RowIndex = tuple[int, int]  # a source, and a row of its embedding


@dataclass(frozen=True)
class SourceVocabulary:
    """The tokens of a source's rows.

    Attributes:
        numbers: token -> number.
        rows: of its embedding; those beyond its tokens are padding.
    """

    label: str
    numbers: Mapping[str, int]
    rows: int

    def rows_of(self, vocabulary: Mapping[str, int], keys: Sequence[Key], unnamed: Any) -> Any:
        """The row of each of the output's, -1 where there is none: numpy int64.

        A row without a token is the same row here, if it is there and has no token.

        Args:
            vocabulary: of the output.
            keys: of its rows.
            unnamed: the numbers of those without a token.
        """
        import numpy as np

        if self.numbers == vocabulary:  # a fraction of the time of looking each up
            rows = np.arange(len(keys))
            rows[self.rows :] = -1
            return rows
        get: Any = self.numbers.get
        rows = np.fromiter(map(get, keys, repeat(-1)), np.int64, len(keys))
        rows[rows >= self.rows] = -1
        padding = unnamed[unnamed < self.rows]
        if len(padding):
            named = np.fromiter(self.numbers.values(), np.int64, len(self.numbers))
            is_free = np.ones(self.rows, bool)
            is_free[named[(named >= 0) & (named < self.rows)]] = False
            rows[padding] = np.where(is_free[padding], padding, -1)
        return rows


class TokenAligner:
    """Finds each output row in every source, by the recipe's rules.

    Args:
        index: a model's name -> its position in `vocabularies`; None for other models.
    """

    def __init__(
        self,
        recipe: Recipe,
        vocabularies: Sequence[SourceVocabulary],
        base: int | None,
        index: Callable[[str], int | None],
    ) -> None:
        assert recipe.tokenizer is not None
        self._recipe, self._rules = recipe, recipe.tokenizer.tokens
        self._vocabularies, self._base, self._index = vocabularies, base, index
        self.notes: list[str] = []
        self.problems: list[Problem] = []

    def tables(self, vocabulary: Mapping[str, int], size: int) -> list[SourceRows]:
        """For each source, the origin of each of the output's rows.

        Args:
            vocabulary, size: of the output: its tokens, and how many rows it has before padding.
        """
        import numpy as np

        keys: list[Key] = list(range(size))
        for token, number in vocabulary.items():
            keys[number] = token
        count = len(self._vocabularies)
        source_indexes = np.full((count, size), ZERO, np.int32)
        rows = np.zeros((count, size), np.int64)
        means: dict[int, list[RowIndex]] = {}
        unfilled = 0
        is_named = np.zeros(size, bool)
        is_named[np.fromiter(vocabulary.values(), np.int64, len(vocabulary))] = True
        unnamed = np.flatnonzero(~is_named)
        rows_of_sources = np.stack(
            [source.rows_of(vocabulary, keys, unnamed) for source in self._vocabularies]
        )
        everywhere = (rows_of_sources >= 0).all(axis=0)
        if any(rule.force for rule in self._rules.values()):
            everywhere = everywhere & np.array([not self._forced(key) for key in keys])
        source_indexes[:, everywhere] = np.arange(count)[:, None]
        rows[:, everywhere] = rows_of_sources[:, everywhere]
        for row in np.flatnonzero(~everywhere).tolist():
            key = keys[row]
            rule = self._rule(key)
            source_rows = [n if n >= 0 else None for n in rows_of_sources[:, row].tolist()]
            default = self._default(key, rule, source_rows)
            unfilled += not default and not (rule and rule.zero)
            for i in range(count):
                row_here = source_rows[i] if not (rule and rule.force) else None
                if row_here is not None:
                    source_indexes[i, row], rows[i, row] = i, row_here
                elif default:
                    source_indexes[i, row], rows[i, row] = default[0]
                    if len(default) > 1:
                        means.setdefault(row, default)
        if unfilled:
            self.notes.append(f"vocabulary: {unfilled} rows that no model has are zeros")
        return [
            SourceRows(
                source_indexes[i],
                rows[i],
                {
                    row: pairs
                    for row, pairs in means.items()
                    if rows_of_sources[i, row] < 0 or self._forced(keys[row])
                },
            )
            for i in range(count)
        ]

    def _rule(self, key: Key) -> TokenRule | None:
        return self._rules.get(key) if isinstance(key, str) else None

    def _forced(self, key: Key) -> bool:
        rule = self._rule(key)
        return rule is not None and rule.force

    def _default(
        self, key: Key, rule: TokenRule | None, source_rows: list[int | None]
    ) -> list[RowIndex]:
        """Rows that fill in for a row that models lack: their mean; zeros if there are none."""
        if rule is not None and (rule.zero or rule.model is not None):
            return [] if rule.zero else self._by_rule(str(key), rule, rule.model)
        candidates = [(i, row) for i, row in enumerate(source_rows) if row is not None]
        if len(candidates) > 1 and self._base is not None and source_rows[self._base] is not None:
            return [(self._base, int(source_rows[self._base] or 0))]
        return candidates

    def _by_rule(self, token: str, rule: TokenRule, model: ModelRef | None) -> list[RowIndex]:
        index = self._index(str(model))
        if index is None:
            message = f"'{model}' is not one of the recipe's models."
            self.problems.append(self._recipe.problem(rule.key, message))
            return []
        row = rule.token_id
        if row is None:
            row = self._vocabularies[index].numbers.get(rule.token or token)
        if row is None or row >= self._vocabularies[index].rows:
            requested = rule.token_id if rule.token_id is not None else repr(rule.token or token)
            message = f"{self._vocabularies[index].label} has no token {requested}."
            self.problems.append(self._recipe.problem(rule.key, message))
            return []
        return [(index, row)]
