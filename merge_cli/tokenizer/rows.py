"""Which row of which model each row of the output is, in every source.

A token that a model lacks gets, in it: what the recipe says; else the base's row; else that of the
only model that has it; else the mean of those that do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from merge_cli.checkpoint.rearranged import ZERO, SourceRows
from merge_cli.errors import Problem
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import TokenRule

Key = str | int  # a token, or the number of a row that no token has
Place = tuple[int, int]  # a source, and a row of its embedding


@dataclass(frozen=True)
class SourceVocabulary:
    """What a source's rows mean.

    Attributes:
        numbers: token -> number.
        rows: of its embedding; those beyond its tokens are padding.
    """

    label: str
    numbers: Mapping[str, int]
    rows: int

    def places(self) -> dict[Key, int]:
        """Its rows by token; by number, where no token has the row."""
        result: dict[Key, int] = {
            token: number for token, number in self.numbers.items() if 0 <= number < self.rows
        }
        used = set(result.values())
        return result | {number: number for number in range(self.rows) if number not in used}


class TokenAligner:
    """Rows for every source, by the recipe's rules.

    Args:
        index: a model's name -> its place among `words`, if it is one of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        words: Sequence[SourceVocabulary],
        base: int | None,
        index: Callable[[str], int | None],
    ) -> None:
        assert recipe.tokenizer is not None
        self._recipe, self._rules = recipe, recipe.tokenizer.tokens
        self._words, self._base, self._index = words, base, index
        self.notes: list[str] = []
        self.problems: list[Problem] = []

    def tables(self, keys: Sequence[Key]) -> list[SourceRows]:
        """For each source, where each of the output's rows comes from."""
        import numpy as np

        owned = [words.places() for words in self._words]
        count = len(owned)
        parts = np.full((count, len(keys)), ZERO, np.int32)
        places = np.zeros((count, len(keys)), np.int64)
        means: dict[int, list[Place]] = {}
        nowhere = 0
        for row, key in enumerate(keys):
            rule = self._rule(key)
            own = [places_of.get(key) for places_of in owned]
            if None not in own and not (rule and rule.force):
                parts[:, row] = np.arange(count)
                places[:, row] = np.array(own, np.int64)
                continue
            default = self._default(key, rule, own)
            nowhere += not default and not (rule and rule.zero)
            for i in range(count):
                kept = own[i] if not (rule and rule.force) else None
                if kept is not None:
                    parts[i, row], places[i, row] = i, kept
                elif default:
                    parts[i, row], places[i, row] = default[0]
                    if len(default) > 1:
                        means.setdefault(row, default)
        if nowhere:
            self.notes.append(f"vocabulary: {nowhere} rows that no model has are zeros")
        return [
            SourceRows(
                parts[i],
                places[i],
                {
                    row: pairs
                    for row, pairs in means.items()
                    if owned[i].get(keys[row]) is None or self._forced(keys[row])
                },
            )
            for i in range(count)
        ]

    def _rule(self, key: Key) -> TokenRule | None:
        return self._rules.get(key) if isinstance(key, str) else None

    def _forced(self, key: Key) -> bool:
        rule = self._rule(key)
        return rule is not None and rule.force

    def _default(self, key: Key, rule: TokenRule | None, own: list[int | None]) -> list[Place]:
        """What fills a row in models that lack it; several rows mean their mean, none zeros."""
        if rule is not None and (rule.zero or rule.model is not None):
            return [] if rule.zero else self._ruled(str(key), rule, rule.model)
        having = [(i, row) for i, row in enumerate(own) if row is not None]
        if len(having) > 1 and self._base is not None and own[self._base] is not None:
            return [(self._base, int(own[self._base] or 0))]
        return having

    def _ruled(self, token: str, rule: TokenRule, model: ModelRef | None) -> list[Place]:
        index = self._index(str(model))
        if index is None:
            message = f"'{model}' is none of the recipe's models."
            self.problems.append(self._recipe.problem(rule.key, message))
            return []
        row = rule.token_id
        if row is None:
            row = self._words[index].numbers.get(rule.token or token)
        if row is None or row >= self._words[index].rows:
            requested = rule.token_id if rule.token_id is not None else repr(rule.token or token)
            message = f"{self._words[index].label} has no token {requested}."
            self.problems.append(self._recipe.problem(rule.key, message))
            return []
        return [(index, row)]
