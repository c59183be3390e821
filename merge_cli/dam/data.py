"""Data of the sources: split into train and held-out, put into batches.

Everything is a function of the data, the settings and the seed. Rows are split before they are cut
into sequences, and by content (`evaluation.content`), so that no document is on both sides.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_cli.data.rows import part_of, read_data
from merge_cli.data.sequences import data_files, sequences, short_names, within
from merge_cli.errors import SourceError
from merge_cli.evaluation.forward import Example
from merge_cli.evaluation.rows import Row, distinct, without
from merge_cli.evaluation.tokens import row_start
from merge_cli.recipe.data import Data
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.training import Training

_POOL = 16  # batches among which sequences are sorted by length


@dataclass(frozen=True)
class Dataset:
    """What one source is good at.

    Attributes:
        name: for tables; `source` is the operand that teaches on it.
        held_out: chooses where to start and which step is best: validation.
        test: rows that choose nothing; the verdict is theirs. Empty where too few are held out.
        rows: how many rows were read; sequences may be more (long rows) or fewer (`examples`).
        removed: rows that are not trained on, because one with the same content is held out.
    """

    name: str
    source: int
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    rows: int
    removed: int = 0
    test: tuple[Example, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over all tokens: the same data in another file is the same data."""
        state = hashlib.sha256()
        for part in (self.train, self.held_out, self.test):
            for item in part:
                state.update(f"{item.first} {len(item.ids)};".encode() + item.ids.tobytes())
            state.update(b"|")
        return state.hexdigest()


@dataclass(frozen=True)
class _Divided:
    """A source's rows, each side in the order in which it is used.

    Attributes:
        train: all of the source's own that are not held out of it; others may hold them out.
        held_out: each content once.
        count: rows that were read, held-out files not counted.
    """

    name: str
    train: list[Row]
    held_out: dict[bytes, Row]
    count: int


def load_datasets(
    recipe: Recipe,
    labels: Sequence[str],
    tokenizer: Any,
    training: Training,
    context: int,
    entries: int | None = None,
) -> list[Dataset]:
    """The data of every source that has some.

    A row that is held out of one source is not trained on by any, wherever else it is.

    Args:
        labels: of the operands, in the formula's order.
        context: tokens that the models take; `max_length` may be less.
        entries: embeddings that the models have.

    Raises:
        SourceError: a file or a row that cannot be used, with file and line.
    """
    specs = [spec for spec in recipe.source_specs if spec.data]
    names = short_names([str(spec.model) for spec in specs])
    divided = []
    for spec, name in zip(specs, names, strict=True):
        assert spec.data is not None
        if str(spec.model) not in labels:  # the base of task vectors: it has none of its own
            message = "its data cannot be used: the base has no task vector"
            raise SourceError(message, model=str(spec.model), hint="Use `form: soup`.")
        divided.append(_divided(recipe, spec.data, name, training))
    held_out = {content for part in divided for content in part.held_out}
    length, whole = min(training.max_length, context), training.prompt_loss
    start = row_start(tokenizer)
    datasets = []
    for spec, item in zip(specs, divided, strict=True):
        assert spec.data is not None
        mixed = without(item.train, held_out) if held_out else item.train
        if not mixed and item.train:
            message = f"all of its {item.count:,} rows are held out, of it or of another source"
            hint = "Name rows for `held_out` that nothing is trained on, or leave it out."
            raise SourceError(message, file=_shown(spec.data), hint=hint)

        def examples_of(rows: Iterable[Row], most: int | None) -> tuple[Example, ...]:
            return tuple(
                sequences(rows, tokenizer, length, most, whole=whole, start=start, entries=entries)
            )

        train = examples_of(mixed, training.examples)
        validation, test = _validation_and_test(list(item.held_out.values()), examples_of, training)
        if not train:
            raise SourceError("has no token to learn from", file=_shown(spec.data))
        source = labels.index(str(spec.model))
        removed = len(item.train) - len(mixed)
        datasets.append(Dataset(item.name, source, train, validation, item.count, removed, test))
    return datasets


def _validation_and_test(
    rows: Sequence[Row], examples_of: Callable[..., tuple[Example, ...]], training: Training
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Held-out rows in two parts: the first ones choose, as many of the others judge.

    A row is in one part alone, however many sequences it is cut into.
    """
    most, tokens = training.held_out_examples, training.held_out_tokens
    validation = within(examples_of(rows, most), tokens)
    if not training.baselines:
        return validation, ()
    used, cut_from = 0, 0
    while used < len(rows) and cut_from < len(validation):
        cut_from += len(examples_of(rows[used : used + 1], None))
        used += 1
    return validation, within(examples_of(rows[used:], most), tokens)


def _divided(recipe: Recipe, data: Data, name: str, training: Training) -> _Divided:
    """Rows of one source, by content: all rows that say the same are on one side.

    Beside `part: train` the other parts are held out: validation first, which chooses.
    """
    if data.part == "train" and not data.held_out:
        return _in_parts(recipe, data, name)
    rows = read_data(data, data_files(data.files, recipe))
    mixed = list(rows)
    random.Random(f"{recipe.seed}:{name}:split").shuffle(mixed)
    if data.held_out:
        kept = read_data(data, data_files(data.held_out, recipe), held_out=True)
        random.Random(f"{recipe.seed}:{name}:held-out").shuffle(kept)
        return _Divided(name, mixed, distinct(kept), len(rows))
    if not training.held_out:
        return _Divided(name, mixed, {}, len(rows))
    contents = distinct(mixed)
    count = round(training.held_out * len(contents))
    if len(contents) > 1:
        count = min(max(count, 1), len(contents) - 1)
    held_out = dict(list(contents.items())[:count])
    chosen = {id(row) for row in held_out.values()}
    return _Divided(name, [row for row in mixed if id(row) not in chosen], held_out, len(rows))


def _in_parts(recipe: Recipe, data: Data, name: str) -> _Divided:
    """Rows that are divided already, by what they say alone: whatever the seed."""
    rows = read_data(replace(data, part="all"), data_files(data.files, recipe))
    mixed = list(rows)
    random.Random(f"{recipe.seed}:{name}:split").shuffle(mixed)
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in mixed:
        parts[part_of(row)].append(row)
    held_out = distinct([*parts["validation"], *parts["test"]])
    return _Divided(name, parts["train"], held_out, len(rows))


def steps_of(datasets: Sequence[Dataset], training: Training) -> int:
    """Optimizer steps: every example of the largest data set once an epoch, within `tokens`."""
    largest = max(len(dataset.train) for dataset in datasets)
    steps = training.epochs * -(-largest // training.batch_size)
    if training.tokens is not None:
        means = [sum(len(e.ids) for e in d.train) / len(d.train) for d in datasets]
        a_step = math.fsum(
            mean * min(training.batch_size, len(d.train))
            for mean, d in zip(means, datasets, strict=True)
        )
        steps = min(steps, max(1, round(training.tokens / a_step)))
    return min(steps, training.max_steps) if training.max_steps else steps


def used(datasets: Sequence[Dataset], steps: int, training: Training) -> list[Dataset]:
    """The data sets without the sequences that so many steps do not come to."""
    most = steps * training.batch_size
    return [replace(dataset, train=dataset.train[:most]) for dataset in datasets]


class Order:
    """Which sequences of a data set make up which step's batch.

    Shuffled anew for each pass; within a pool of some batches sorted by length, so that little is
    padded, and the batches shuffled again. A smaller data set begins again when it is used up.
    """

    def __init__(self, dataset: Dataset, training: Training, seed: int) -> None:
        self._dataset, self._size, self._seed = dataset, training.batch_size, seed
        self._passes: dict[int, list[list[int]]] = {}

    def batch(self, step: int) -> list[int]:
        """Numbers of the train sequences of a step, which counts from 0."""
        count = -(-len(self._dataset.train) // self._size)
        number, index = divmod(step, count)
        if number not in self._passes:
            self._passes = {number: self._pass(number)}
        return self._passes[number][index]

    def _pass(self, number: int) -> list[list[int]]:
        chance = random.Random(f"{self._seed}:{self._dataset.name}:pass {number}")
        order = list(range(len(self._dataset.train)))
        chance.shuffle(order)
        result: list[list[int]] = []
        for start in range(0, len(order), self._size * _POOL):
            pool = sorted(
                order[start : start + self._size * _POOL],
                key=lambda i: len(self._dataset.train[i].ids),
            )
            result += [pool[i : i + self._size] for i in range(0, len(pool), self._size)]
        chance.shuffle(result)
        return result


def _shown(data: Data) -> str:
    return ", ".join(data.files) or str(data.dataset)
