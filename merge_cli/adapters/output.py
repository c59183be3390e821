"""The folder of an adapter: made beside OUT, and OUT when it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from merge_cli.checkpoint.raw import write_error
from merge_cli.engine.inputs import Inputs
from merge_cli.engine.output import OutputWorkspace
from merge_cli.errors import Interrupted


@contextmanager
def adapter_output(
    out: Path, *, overwrite: bool, precious: Sequence[Path], inputs: Inputs, fresh: bool = False
) -> Iterator[Path]:
    """A folder to write into, published at the end; thrown away after an error.

    Args:
        inputs: what is read meanwhile, and must be the same at the end.
        fresh: throw away what other work has left.

    Raises:
        SourceError: something that was read has changed.
        UsageError: OUT exists, or holds what is needed.
        ResourceError: another process writes there, or it cannot be written.
        Interrupted: Ctrl-C.
    """
    with OutputWorkspace(out) as work:
        work.refuse(overwrite, list(precious))
        if not fresh:
            work.refuse_other_work("an adapter")
        work.discard()
        try:
            work.begin("an adapter")
            yield work.model
            inputs.verify()
            work.publish()
        except OSError as error:
            raise write_error(error, work.model) from error
        except KeyboardInterrupt:
            raise Interrupted("stopped", where=str(out), hint="Nothing was written.") from None
        finally:
            work.discard()
