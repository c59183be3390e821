"""One vocabulary for all sources: which row of which model each token's row is.

    tokenizers ─▶ the output's tokens ─▶ for each model: rows ─▶ computed embeddings and heads

A token that a model lacks gets, in it: what the recipe says; else the base's row; else that of the
only model that has it; else the mean of those that do. Rows beyond a tokenizer (padding) are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.gathered import ZERO, Gathered, Rows
from merge_cli.checkpoint.source import Source
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.checkpoint.tokenizer_document import converted_vocabulary
from merge_cli.checkpoint.tokenizer_files import opaque_files, read_vocabulary
from merge_cli.checkpoint.union import join
from merge_cli.engine.heads import EMBEDDINGS, View
from merge_cli.errors import CorruptFileError, Problem, RecipeError, SourceError
from merge_cli.recipe.reference import ModelRef, local_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.tokenizer import BASE, UNION, TokenRule

# What tensors with a row for each token are called, whatever the architecture.
_WORDS = ("embed", "wte", "lm_head", "shared.weight", "output.weight", "decoder.weight",
          "decoder.bias", "predictions.bias", "final_logits_bias", "logits", "head")  # fmt: skip
Key = str | int  # a token, or the number of a row that no token has
Place = tuple[int, int]  # a source, and a row of its embedding


@dataclass(frozen=True)
class Aligned:
    """Sources with one vocabulary.

    Attributes:
        views: for each source, its tensors.
        donor: index of the source whose tokenizer files the output has.
        files: tokenizer files that differ from the donor's.
        rows: of the output's embeddings; None leaves the config's word.
        ids: token's number in the config donor -> in the output; None where nothing moves.
        notes: what was done.
        changed: whether any tensor was rearranged.
    """

    views: tuple[View, ...]
    donor: int
    files: Mapping[str, bytes] = field(default_factory=dict)
    rows: int | None = None
    ids: Mapping[int, int] | None = None
    notes: tuple[str, ...] = ()
    changed: bool = False

    def need_plain(self, recipe: Recipe, work: str) -> None:
        """For what runs the sources as they are.

        Raises:
            RecipeError: rows were rearranged.
        """
        if self.changed or self.files:
            what = f"{work} runs the models, which must share a vocabulary."
            hint = "Bring them to one vocabulary first: merge each alone, with this section."
            key = "tokenizer" if "tokenizer" in recipe.places else "tokenizer_source"
            raise RecipeError([recipe.problem(key, what, hint)])


def align(
    recipe: Recipe, sources: Sequence[Source], views: Sequence[View], base: int | None, donor: int
) -> Aligned:
    """Bring the sources' embeddings and heads into the order that the recipe asks for.

    Args:
        views: as `heads` has reconciled them.
        donor: whose config the output takes.

    Raises:
        RecipeError: a token or a model that is not there.
        SourceError: a tokenizer that cannot be read, or to which nothing can be added.
    """
    spec = recipe.tokenizer
    if spec is None:
        return Aligned(tuple(views), donor)
    return _Alignment(recipe, sources, views, base, donor).result()


class _Alignment:
    def __init__(
        self, recipe: Recipe, sources: Sequence[Source], views: Sequence[View],
        base: int | None, donor: int,
    ) -> None:  # fmt: skip
        assert recipe.tokenizer is not None
        self._recipe, self._spec = recipe, recipe.tokenizer
        self._sources, self._views = sources, views
        self._base, self._donor = base, donor
        self._notes: list[str] = []
        self._problems: list[Problem] = []
        self._first = base if base is not None else 0
        if self._spec.source != UNION:
            self._named(self._spec.source)
        self._tokens = [_vocabulary(source) for source in sources]
        self._fill_in()
        self._rows = [_height(s, v) for s, v in zip(sources, views, strict=True)]

    def result(self) -> Aligned:
        chosen, vocabulary, files = self._output()
        rows = max([self._rows[chosen], *(number + 1 for number in vocabulary.values())])
        multiple = self._spec.pad_to_multiple_of
        if multiple:
            rows = -(-rows // multiple) * multiple
        keys: list[Key] = list(range(rows))
        for token, number in vocabulary.items():
            keys[number] = token
        owned = [self._places(i) for i in range(len(self._sources))]
        tables = self._tables(keys, owned)
        if self._problems:
            raise RecipeError(self._problems)
        views, changed = self._gather(tables, rows)
        if changed:
            self._notes.append(
                f"vocabulary: {rows} rows, {len(vocabulary)} tokens; {', '.join(changed)} "
                "rearranged"
            )
        ids = self._ids(vocabulary)
        return Aligned(views, chosen, files, rows, ids, tuple(self._notes), bool(changed))

    def _fill_in(self) -> None:
        """A model without tokenizer files counts its rows as the base does."""
        known = self._tokens[self._first]
        if not known:
            what = "has no tokenizer, so that nobody can tell what its rows mean"
            raise SourceError(what, model=self._sources[self._first].label)
        for i, tokens in enumerate(self._tokens):
            if tokens:
                continue
            source = self._sources[i]
            self._tokens[i] = known
            first = self._sources[self._first].label
            self._notes.append(f"{source.label}: has no tokenizer; taken to have {first}'s")

    def _output(self) -> tuple[int, Mapping[str, int], Mapping[str, bytes]]:
        """Whose files the output has, its tokens, and the files that are its own."""
        spec, extra = self._spec, list(self._spec.tokens)
        if spec.source == UNION:
            others = [
                (self._sources[i], self._tokens[i])
                for i in range(len(self._sources)) if i != self._first
            ]  # fmt: skip
            chosen = self._first
        else:
            others, chosen = [], self._named(spec.source)
        own = self._tokens[chosen]
        union = join(self._sources[chosen], others, own, extra)
        self._notes += union.notes
        return chosen, union.vocabulary, union.files

    def _named(self, word: str) -> int:
        """The source that `base`, or a model's name, means."""
        if word == BASE:
            if self._base is None:
                what = "there is no base_model to take the tokenizer from."
                raise RecipeError([self._recipe.problem(self._spec.key, what)])
            return self._base
        found = self._index(word)
        if found is None:
            what = f"'{word}' is none of the recipe's models."
            hint = "Use `union`, `base` or one of them."
            raise RecipeError([self._recipe.problem(self._spec.key, what, hint)])
        return found

    def _index(self, word: str) -> int | None:
        place = local_folder(word, self._recipe.folder)
        for i, source in enumerate(self._sources):
            own = local_folder(source.label, self._recipe.folder)
            if source.label == word or (place and own and place.resolve() == own.resolve()):
                return i
        return None

    def _places(self, i: int) -> dict[Key, int]:
        """A source's rows by token; by number, where no token has the row."""
        rows = self._rows[i]
        found: dict[Key, int] = {
            token: number for token, number in self._tokens[i].items() if number < rows
        }
        used = set(found.values())
        return found | {number: number for number in range(rows) if number not in used}

    def _tables(self, keys: Sequence[Key], owned: Sequence[dict[Key, int]]) -> list[Rows]:
        """For each source, where each of the output's rows comes from."""
        import numpy as np

        count = len(self._sources)
        parts = np.full((count, len(keys)), ZERO, np.int32)
        places = np.zeros((count, len(keys)), np.int64)
        means: dict[int, list[Place]] = {}
        nowhere = 0
        for row, key in enumerate(keys):
            rule = self._spec.tokens.get(key) if isinstance(key, str) else None
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
            self._notes.append(f"vocabulary: {nowhere} rows that no model has are zeros")
        return [
            Rows(
                parts[i], places[i],
                {row: pairs for row, pairs in means.items() if owned[i].get(keys[row]) is None
                 or self._forced(keys[row])},
            )
            for i in range(count)
        ]  # fmt: skip

    def _forced(self, key: Key) -> bool:
        rule = self._spec.tokens.get(key) if isinstance(key, str) else None
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
            what = f"'{model}' is none of the recipe's models."
            self._problems.append(self._recipe.problem(rule.key, what))
            return []
        row = rule.token_id
        if row is None:
            row = self._tokens[index].get(rule.token or token)
        if row is None or row >= self._rows[index]:
            wanted = rule.token_id if rule.token_id is not None else repr(rule.token or token)
            what = f"{self._sources[index].label} has no token {wanted}."
            self._problems.append(self._recipe.problem(rule.key, what))
            return []
        return [(index, row)]

    def _gather(self, tables: Sequence[Rows], rows: int) -> tuple[tuple[View, ...], list[str]]:
        """Every source's tensors, those with a row for each token rearranged; their names."""
        import numpy as np

        names = [name for name in self._views[0] if self._has_tokens(name)]
        moved = [
            not (
                rows == self._rows[i] and bool((table.part == i).all())
                and bool((table.row == np.arange(rows)).all())
            )
            for i, table in enumerate(tables)
        ]  # fmt: skip
        views = []
        for view, table, changed in zip(self._views, tables, moved, strict=True):
            new: dict[str, Tensor] = dict(view)
            if changed:
                for name in names:
                    parts = tuple(other[name] for other in self._views)
                    new[name] = Gathered(view[name], parts, table)
            views.append(new)
        return tuple(views), names if any(moved) else []

    def _has_tokens(self, name: str) -> bool:
        """Whether a tensor has a row for each token, in every source."""
        if not any(word in name for word in _WORDS) or "position" in name:
            return False
        return all(
            name in view and bool(view[name].shape) and view[name].shape[0] == rows
            for view, rows in zip(self._views, self._rows, strict=True)
        )

    def _ids(self, vocabulary: Mapping[str, int]) -> Mapping[int, int] | None:
        """How the numbers in the donor's config change."""
        tokens = {number: t for t, number in self._tokens[self._donor].items()}
        moved = {n: vocabulary[t] for n, t in tokens.items() if t in vocabulary}
        return None if all(a == b for a, b in moved.items()) else moved


def renumber(config: Mapping[str, Any], aligned: Aligned) -> dict[str, Any]:
    """A config, or generation settings, with the output's token numbers and number of rows."""

    def walk(about: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in about.items():
            if isinstance(value, dict):
                value = walk(value)
            elif aligned.ids is not None and key.endswith("_token_id"):
                value = _moved(value, aligned.ids)
            found[key] = value
        return found

    new = walk(config)
    part = text_config(new)
    if aligned.rows is not None and "vocab_size" in part:
        part["vocab_size"] = aligned.rows
    return new


def _moved(value: Any, ids: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_moved(one, ids) for one in value]
    return ids.get(value, value) if type(value) is int else value


def _vocabulary(source: Source) -> Mapping[str, int]:
    """Token -> number; empty for a model without a tokenizer."""
    listed = read_vocabulary(source)
    return listed if listed or not opaque_files(source) else converted_vocabulary(source)


def _height(source: Source, view: View) -> int:
    """Rows of a source's input embedding."""
    found = [ref.shape[0] for name, ref in view.items()
             if name.endswith(EMBEDDINGS) and len(ref.shape) == 2]  # fmt: skip
    wanted = text_config(source.config).get("vocab_size")
    if isinstance(wanted, int) and wanted in found:
        return wanted
    if not found:
        raise SourceError("has no input embedding whose rows could be rearranged",
                          model=source.label)  # fmt: skip
    return max(found)


def vocabulary_notes(sources: Sequence[Source]) -> Iterator[str]:
    """Models whose rows mean other tokens, where the recipe says nothing of it."""
    files = [source.root / "tokenizer.json" for source in sources]
    contents = [file.read_bytes() if file.is_file() else None for file in files]
    if len({text for text in contents if text is not None}) < 2:
        return
    known: list[tuple[Source, Mapping[str, int]]] = []
    for source, text in zip(sources, contents, strict=True):
        try:
            if text is not None:
                known.append((source, read_vocabulary(source)))
        except CorruptFileError as error:  # no reason not to merge: the files are only copied
            yield f"{source.label}: {error.what}; whether its tokens are the others' is not known"
    for source, own in known[1:]:
        first, reference = known[0]
        by_number = {number: token for token, number in reference.items()}
        other = sum(by_number.get(number, token) != token for token, number in own.items())
        if other:
            yield (
                f"{source.label}: {other} of {len(own)} token numbers mean other tokens than in "
                f"{first.label}, and are merged all the same; `tokenizer: {{source: union}}` brings"
                " rows together by token"
            )
