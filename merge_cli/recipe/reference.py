"""How a recipe names a model, and where that name leads.

`path-or-hub-id[@revision][+lora[@revision]]`, or a mapping. A path that exists on disk wins over
the reading of `+` and `@`, and over the Hub; `hf://organisation/name` is the Hub's, whatever is on
disk. `organisation/name/FILE` is one file of a repository, `organisation/name:Q4_K_M` its GGUF file
in that quantisation. What begins with `s3://`, `https://` and the like is an address. Relative
paths belong to the recipe's file, so that a recipe in git works from any folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HUB = "hf://"
STAGES = "stages"  # a folder of a result: what its stages bring
# The Hub's own rules; what they refuse need not be asked for.
_HUB_ID = re.compile(r"[A-Za-z0-9_](?:[\w.-]*\w)?(?:/[A-Za-z0-9_](?:[\w.-]*\w)?)?", re.ASCII)
_LONGEST_ID = 96
_HUB_FILE = re.compile(r"([^/:]+/[^/:]+)(?:/([^:]+\.(?:gguf|safetensors|bin|pt|pth|ckpt))|(:\w+))")
_ADDRESS = re.compile(r"[a-z][a-z0-9]*://")
_REVISION = re.compile(r"[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)


@dataclass(frozen=True)
class ModelRef:
    """One model as written: `path` is a folder or a Hub id; `lora` is applied on top of it."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        text = self.path + (f"@{self.revision}" if self.revision else "")
        if self.lora:
            text += f"+{self.lora}" + (f"@{self.lora_revision}" if self.lora_revision else "")
        return text


def stage_folder(name: str) -> str:
    """The name of the folder that a stage's result lies in."""
    return name.replace("/", "--")


def parse_reference(text: str, folder: Path) -> ModelRef:
    """Read the short form of a model reference; `folder` is where relative paths start."""
    if local_folder(text, folder) is not None:
        return ModelRef(text)
    model, _, lora = text.partition("+")
    path, revision = _split_revision(model, folder)
    if not lora:
        return ModelRef(path, revision)
    return ModelRef(path, revision, *_split_revision(lora, folder))


def local_folder(path: str, folder: Path) -> Path | None:
    """The folder on disk that `path` means, or None.

    Looked for beside the recipe first, then in the working directory, where mergekit looks.
    """
    if not path or path.startswith(HUB) or is_address(path):
        return None
    try:
        given = expanded(path)
        for candidate in (folder / given, Path.cwd() / given):  # an absolute path replaces either
            if candidate.exists():
                return candidate
    except (OSError, RuntimeError, ValueError):
        return None  # too long for a path, or the home of a user who does not exist
    return None


def local_file(path: str, folder: Path) -> Path | None:
    """The file that `path` means, looked for as `local_folder` does; None if there is none."""
    result = local_folder(path, folder)
    return result if result is not None and result.is_file() else None


def hub_id(path: str) -> str | None:
    """The repository that `path` can mean, `name` or `organisation/name`; None if it cannot."""
    name = path.removeprefix(HUB)
    fits = len(name) <= _LONGEST_ID and "--" not in name and ".." not in name
    return name if fits and not name.endswith(".git") and _HUB_ID.fullmatch(name) else None


def hub_file(path: str) -> tuple[str, str] | None:
    """The repository and the file that `path` can mean; None if it cannot.

    Returns:
        the file as a path in the repository, or `:WORD` for the GGUF file with that word.
    """
    result = _HUB_FILE.fullmatch(path.removeprefix(HUB))
    if result is None or hub_id(result[1]) is None or ".." in path.split("/"):
        return None
    return result[1], result[2] or result[3]


def is_address(path: str) -> bool:
    """Whether it is the address of a store or a server: `s3://bucket/folder`."""
    return _ADDRESS.match(path) is not None and not path.startswith(HUB)


def is_revision(text: str) -> bool:
    """Whether a branch, a tag or a commit can be called so; it becomes part of paths."""
    fits = len(text) <= 200 and ".." not in text and not text.startswith("-")
    return fits and _REVISION.fullmatch(text) is not None


def expanded(path: str) -> Path:
    """A path with `~` as the home it means; as it is where there is no such user, or no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def short_labels(labels: Sequence[str]) -> list[str]:
    """The last part of each path or id; whole where that would not tell them apart."""
    short = [label.rstrip("/").rpartition("/")[2] or label for label in labels]
    return short if len(set(short)) == len(short) else list(labels)


def _split_revision(text: str, folder: Path) -> tuple[str, str | None]:
    if local_folder(text, folder) is not None:
        return text, None
    if is_address(text):  # it has no revisions; a login in it is refused when it is opened
        return text, None
    path, _, revision = text.partition("@")
    return path, revision or None
