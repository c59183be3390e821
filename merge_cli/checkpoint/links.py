"""Links in somebody else's folder: which files may be copied into what we publish.

A link that leads out of its model's folder could bring any file of this machine into the output,
and from there to the Hub. Links inside the folder are the model's own, and so are those of the
Hub's cache:

    models--org--name/snapshots/COMMIT/tokenizer.json -> ../../blobs/HASH
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from merge_cli.errors import SourceError

_HINT = "Replace the link by a copy of the file, if it is meant to be published."


def leads_out(path: Path, root: Path) -> bool:
    """Whether a file in a folder is a link to somewhere that does not belong to it."""
    home = Path(os.path.realpath(root))
    real = Path(os.path.realpath(path))
    allowed = [home]
    repository = home.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        allowed.append(repository / "blobs")
    return not any(place in real.parents for place in allowed)


def refuse_links(paths: Iterable[Path], root: Path, label: str) -> None:
    """Raise if files that would be copied are links out of their folder.

    Raises:
        SourceError: names every one.
    """
    found = [path.relative_to(root).as_posix() for path in paths if leads_out(path, root)]
    if found:
        verb = "is a link" if len(found) == 1 else "are links"
        what = f"{', '.join(sorted(found))} {verb} out of the model's folder, and would be copied"
        raise SourceError(what, model=label, hint=_HINT)


def copy_inside(path: Path, root: Path, target: Path) -> None:
    """Copy a file of a folder, unless it is a link out of it by now.

    Raises:
        SourceError: it is.
    """
    refuse_links([path], root, str(root))
    shutil.copyfile(path, target)
