"""A model's stored tensors as columns: the object of each is made when one of them is asked for.

Planning compares models by their columns, which fine-tunes share with their base.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.header_columns import HeaderColumns
from merge_cli.checkpoint.headers import TensorRef, refs_of


class StoredTensors(Mapping[str, TensorRef]):
    """Tensor name -> where it is, in the order of the files.

    Attributes:
        columns: the same, as columns.
    """

    def __init__(self, columns: HeaderColumns, paths: Iterable[Path], model: str) -> None:
        """Args: see `headers.refs_of`."""
        self.columns = columns
        self._paths, self._model = tuple(paths), model

    @cached_property
    def refs(self) -> list[TensorRef]:
        """Every tensor, in the order of the columns."""
        return [*refs_of(self.columns, self._paths, self._model)]

    @cached_property
    def _by_name(self) -> dict[str, TensorRef]:
        return dict(zip(self.columns.names, self.refs, strict=True))

    def __getitem__(self, name: str) -> TensorRef:
        return self._by_name[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self._by_name.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self.columns.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.names)

    def __len__(self) -> int:
        return len(self.columns.names)

    def keys(self) -> KeysView[str]:
        return self.columns.rows.keys()

    def values(self) -> ValuesView[TensorRef]:
        return _Values(self)

    def items(self) -> ItemsView[str, TensorRef]:
        return _Items(self)


class _Values(ValuesView[TensorRef]):
    _mapping: StoredTensors

    def __iter__(self) -> Iterator[TensorRef]:
        return iter(self._mapping.refs)


class _Items(ItemsView[str, TensorRef]):
    _mapping: StoredTensors

    def __iter__(self) -> Iterator[tuple[str, TensorRef]]:
        return zip(self._mapping.columns.names, self._mapping.refs, strict=True)
