"""Notices: what a user should know although nothing failed, given once by whoever finds it out.

The command line prints them (console/); another program finds them in the log `merge_cli`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("merge_cli")
_given: dict[str, None] = {}  # in this process, in order


def say_once(text: str) -> None:
    """Say it, unless this process has said it before."""
    if text not in _given:
        _given[text] = None
        log.warning(text)


class _Handler(logging.Handler):
    def __init__(self, handle: Callable[[str], None]) -> None:
        super().__init__()
        self._take = handle

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record.getMessage())


def send_notices(handle: Callable[[str], None] | None) -> None:
    """Give notices, past and future, to one receiver, and print them nowhere else.

    Args:
        handle: takes each text, instead of the receiver before; None keeps them for the next.
    """
    for handler in [
        item for item in log.handlers if isinstance(item, _Handler | logging.NullHandler)
    ]:
        log.removeHandler(handler)
    if handle is None:
        log.addHandler(logging.NullHandler())
        return
    for text in _given:
        handle(text)
    log.addHandler(_Handler(handle))
