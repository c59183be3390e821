"""A source's examples: some of its rows, cut into sequences, in an order of their own.

Which tensors of a model, as its files name them, are what in the loaded model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.tensors import is_weight
from merge_cli.data.rows import read_data
from merge_cli.data.sequences import data_files, sequences
from merge_cli.engine.parameter_slices import by_name, filled_layers, layer_of
from merge_cli.errors import SourceError
from merge_cli.evaluation.empty import kinds_of
from merge_cli.evaluation.forward import Example
from merge_cli.evaluation.rows import distinct
from merge_cli.evaluation.tokens import row_start
from merge_cli.recipe.data import Data
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.statistics import Statistics
from merge_cli.sources.source import Source


@dataclass(frozen=True)
class Examples:
    """What one source is looked at with.

    Attributes:
        rows: how many rows its data has.
        items: the longest first, so that the order of rows in a file does not matter.
        duplicates: rows that are left out, because another one says the same.
    """

    rows: int
    items: tuple[Example, ...]
    duplicates: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(item.ids) for item in self.items)

    @property
    def digest(self) -> str:
        """SHA-256 over all tokens: the same data in another file is the same data."""
        state = hashlib.sha256()
        for item in self.items:
            state.update(f"{item.first} {len(item.ids)};".encode() + item.ids.tobytes())
        return state.hexdigest()


def load_examples(
    recipe: Recipe,
    data: Data,
    tokenizer: Any,
    statistics: Statistics,
    context: int,
    entries: int | None = None,
) -> Examples:
    """Read, choose by the recipe's seed, tokenise and cut. A row that is there twice counts once.

    Args:
        context: tokens that the model takes; `max_length` may be less.
        entries: embeddings that the model has.

    Raises:
        SourceError: a file or a row that cannot be used, with file and line.
    """
    rows = read_data(data, data_files(data.files, recipe))
    mixed = list(rows)
    # One order for all sources, whatever they are called: the same data is the same examples.
    random.Random(f"{recipe.seed}:examples").shuffle(mixed)
    length = min(statistics.max_length, context)
    unique = distinct(mixed)
    result = sequences(
        unique.values(),
        tokenizer,
        length,
        statistics.examples,
        start=row_start(tokenizer),
        entries=entries,
    )
    if not result:
        raise SourceError("has no token to look at", file=shown(data))
    return Examples(len(rows), tuple(longest_first(result)), len(rows) - len(unique))


def shown(data: Data) -> str:
    """Files or data set, as the recipe names them."""
    return ", ".join(data.files) or str(data.dataset)


def longest_first(examples: Iterable[Example]) -> list[Example]:
    """In an order that does not depend on that of the rows in a file."""
    return sorted(
        examples, key=lambda example: (-len(example.ids), example.ids.tobytes(), example.first)
    )


def batches_of(examples: Sequence[Example], tokens: int) -> list[Sequence[Example]]:
    """Neighbours of one length, of at most `tokens` together: without padding.

    A layer that sees some of the tokens only (an expert) could not tell padding from text.
    """
    batches: list[Sequence[Example]] = []
    start = 0
    while start < len(examples):
        width = len(examples[start].ids)
        stop = start + 1
        while (
            stop < len(examples)
            and len(examples[stop].ids) == width
            and width * (stop + 1 - start) <= tokens
        ):
            stop += 1
        batches.append(examples[start:stop])
        start = stop
    return batches


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer.

    Attributes:
        stored: the tensor's name in the model's files.
        module: the module's name in the loaded model.
        width: of its input.
        input_first: it is stored [in, out].
    """

    stored: str
    module: str
    width: int
    input_first: bool


def parameters_of(net: Any, source: Source) -> dict[str, str]:
    """Stored name -> parameter, for every tensor that is one parameter of the loaded model."""
    stored = {t.name: t.shape for t in source.tensors.values() if is_weight(t)}
    parameters: dict[str, str] = {}
    taken: set[str] = set()
    for name, parameter in by_name(stored, dict(net.named_parameters())).items():
        if parameter not in taken:
            parameters[name] = parameter
            taken.add(parameter)
    return parameters


def stored_parameters(net: Any, source: Source) -> set[str]:
    """Every tensor that is a parameter of a model, which may be empty, or a part of one."""
    names = parameters_of(net, source)
    taken = set(names.values())
    rest = {name: item for name, item in net.named_parameters() if name not in taken}
    loose = {name: ref.size for name, ref in source.tensors.items() if name not in names}
    filled = filled_layers(rest, loose)
    return set(names) | {name for name in loose if layer_of(name) in filled}


def linear_layers(net: Any, source: Source) -> list[LinearLayer]:
    """Every linear layer whose weight is stored, in the order of the model.

    A head that is tied to the embedding is none: what looks tokens up must not be regressed.
    """
    order = {name: number for number, (name, _) in enumerate(net.named_modules())}
    return sorted(_layers(net, source), key=lambda layer: order[layer.module])


def _layers(net: Any, source: Source) -> Iterator[LinearLayer]:
    kinds = kinds_of(net)
    for stored, parameter in parameters_of(net, source).items():
        module, _, last = parameter.rpartition(".")
        kind = kinds[parameter]
        if last == "weight" and kind in ("linear", "conv1d"):
            shape = net.get_parameter(parameter).shape
            if len(shape) == 2:
                first = kind == "conv1d"
                yield LinearLayer(stored, module, shape[0] if first else shape[1], first)
