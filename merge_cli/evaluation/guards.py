"""Around calls of torch and transformers: their bars and advice hidden, a lack of memory said."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

from merge_cli.errors import ResourceError


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide progress bars and advice, of transformers and of what it loads models with."""
    import transformers
    from tqdm import tqdm

    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    begin_bar = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(begin_bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            yield
    finally:
        tqdm.__init__ = begin_bar
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def memory_errors(label: str, hint: str) -> Iterator[None]:
    """Report a lack of memory, on the host or on the device, as a ResourceError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and (
            type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error)
        ):
            raise
        raise ResourceError("memory ran out", where=label, hint=hint) from error
