"""The folder of an adapter: made beside OUT, and OUT when it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from merge_cli.checkpoint.raw import write_error
from merge_cli.engine.workfolder import WorkFolder
from merge_cli.errors import Interrupted


@contextmanager
def adapter_output(out: Path, *, overwrite: bool, precious: Sequence[Path]) -> Iterator[Path]:
    """A folder to write into, published at the end; thrown away after an error.

    Raises:
        UsageError: OUT exists, or holds what is needed.
        ResourceError: another process writes there, or it cannot be written.
        Interrupted: Ctrl-C.
    """
    with WorkFolder(out) as work:
        work.refuse(overwrite, list(precious))
        work.refuse_other_work("an adapter")
        work.discard()
        try:
            work.model.mkdir(parents=True)
            yield work.model
            work.publish(fsync=False)
        except OSError as error:
            raise write_error(error, work.model) from error
        except KeyboardInterrupt:
            raise Interrupted("stopped", where=str(out), hint="Nothing was written.") from None
        finally:
            work.discard()
