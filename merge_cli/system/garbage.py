"""Python's search for objects that only refer to one another, held off where there are none."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without that search.

    A plan or an analysis is up to a million objects and no garbage; looking at all of them again
    and again takes a third of the time. Nor does the first search afterwards look at them: what has
    been frozen goes back as old.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if gc.get_freeze_count() == 0:  # else a program has frozen objects of its own
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def keep_to_the_end() -> None:
    """Let no search look again at what there is now, for programs that are about to end.

    Python searches all of it when it ends: a quarter of a second once numba is loaded. With torch
    it has to: libraries that come with it print what is left of them.
    """
    if "torch" not in sys.modules:
        gc.freeze()
