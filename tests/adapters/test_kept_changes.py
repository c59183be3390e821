"""Changes that wait in memory: the same numbers, computed once while there is room."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from merge_cli.adapters.kept_changes import ChangeCache, KeptChange
from merge_cli.checkpoint.tensors import Read, Zeros


@dataclass(frozen=True)
class Counted(Zeros):
    """Numbers that count up, and where it was asked for them."""

    asked: list[int] = field(default_factory=list, compare=False)

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        self.asked.append(start)
        numbers = np.arange(start, start + len(buffer) // 4, dtype=np.float32)
        buffer[:] = numbers.tobytes()


def read(*_: Any) -> None:
    raise AssertionError("nothing is stored")


def numbers(tensor: KeptChange, start: int, count: int) -> list[float]:
    buffer = bytearray(4 * count)
    tensor.fill(read, start, memoryview(buffer))
    return list(np.frombuffer(buffer, np.float32).tolist())


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 11)), max_size=20), st.integers(0, 200))
def test_any_span_is_what_the_change_holds(spans: list[tuple[int, int]], room: int) -> None:
    cache = ChangeCache(room)
    kept = [KeptChange(Counted(str(i), "adapter", (3, 4)), cache) for i in range(3)]
    for which, start in spans:
        assert numbers(kept[which], start, 12 - start) == list(range(start, 12))


def test_it_is_computed_once_where_there_is_room_and_again_where_there_is_none() -> None:
    for room, computed in ((1000, 1), (48, 4)):
        cache = ChangeCache(room)
        first, second = (Counted(name, "adapter", (3, 4)) for name in "ab")
        for _ in range(4):
            for change in (first, second):
                numbers(KeptChange(change, cache), 2, 3)
        assert first.asked == second.asked == [0] * computed


def test_threads_that_ask_at_once_compute_it_once() -> None:
    change = Counted("a", "adapter", (1000, 1000))
    kept = KeptChange(change, ChangeCache(1 << 30))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda start: numbers(kept, start, 5), range(0, 8000, 100)))
    assert results == [list(range(start, start + 5)) for start in range(0, 8000, 100)]
    assert len(change.asked) == len(set(change.asked))
