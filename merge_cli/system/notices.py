"""Notices: what a user should know although nothing failed, given once by whoever finds it out.

The command line prints them (console/); another program finds them in the log `merge_cli`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("merge_cli")
_said: dict[str, None] = {}  # in this process, in order


def say_once(text: str) -> None:
    """Say it, unless this process has said it before."""
    if text not in _said:
        _said[text] = None
        log.warning(text)


class _Told(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


def send_notices(tell: Callable[[str], None] | None) -> None:
    """Tell of what has been said and what will be, and print it nowhere else.

    Args:
        tell: whoever was given before is told no more; None keeps everything for the next.
    """
    for handler in [item for item in log.handlers if isinstance(item, _Told | logging.NullHandler)]:
        log.removeHandler(handler)
    if tell is None:
        log.addHandler(logging.NullHandler())
        return
    for text in _said:
        tell(text)
    log.addHandler(_Told(tell))
