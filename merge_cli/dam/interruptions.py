"""Ctrl-C and SIGTERM while something is learned: remembered, so that no step is broken off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from merge_cli.errors import Interrupted


class Interruptions:
    """Ctrl-C and SIGTERM. Called, it says whether one has come.

    Attributes:
        patient: whether the first one is only remembered, so that a step is not broken off
            half-way. The second one is not waited for: then the last checkpoint is what there is.
    """

    def __init__(self) -> None:
        self.patient = False
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def receive(self, number: int, frame: object) -> None:
        """A signal's handler."""
        if self._asked or not self.patient:
            raise KeyboardInterrupt
        self._asked = True


@contextmanager
def interruptions() -> Iterator[Interruptions]:
    """Tell of signals; at first one stops everything at once.

    Raises:
        Interrupted: that happened.
    """
    result = Interruptions()
    if threading.current_thread() is not threading.main_thread():
        yield result
        return
    before = {kind: signal.signal(kind, result.receive) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield result
    except KeyboardInterrupt:
        raise Interrupted("stopped at once", hint="The same command continues.") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
