"""What can go wrong, as types that carry fields as well as text.

    MergeCliError                 1    unexpected
    ├── RecipeError               2    the recipe, every problem at once
    ├── UsageError                2    flags and arguments
    ├── SourceError               3    an input model or data file
    │   ├── CorruptFileError      3    a file that is not what its header or index says
    │   ├── HubError              3    a repository that is missing, private or out of reach
    │   ├── RemoteError           3    the same of an address: s3://, https://
    │   ├── MismatchError         3    sources that cannot be merged with one another, all at once
    │   └── NonFiniteError        3    NaN or Inf in a source
    ├── ResourceError             4    disk, memory, device
    ├── GateError                 5    a quality gate that the user set was not met
    ├── UnexpectedError           1    a fault of this program; its traceback is in a file
    └── Interrupted             130    Ctrl-C or SIGTERM; the same command resumes

The number is the process's exit code. Every message reads `<what> — <where> — <what to do>`.
This module imports nothing, so that anything may import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class MergeCliError(Exception):
    """Base of all errors that a user can act on.

    Args:
        message: what is wrong, with the values that show it.
        where: the file, model or tensor it is about.
        hint: what to do now.
    """

    exit_code = 1
    title = "Error"

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        self.message, self.where, self.hint = message, where, hint
        # Full stops belong to the end: `unknown method 'tie' — Did you mean 'ties'?` A place keeps
        # its own: the folder `.` is one.
        first = message.rstrip(".") if where or hint else message
        super().__init__(" — ".join(part for part in (first, where, hint) if part))

    def at(self, position: str) -> MergeCliError:
        """The same error with the place in a recipe that it comes from: `file:line:column`."""
        if position:
            self.args = (f"{position}: {self}",)
        return self


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at one place. `line` and `column` count from 1; 0 means unknown."""

    message: str
    key: str = ""
    file: str = ""
    line: int = 0
    column: int = 0
    hint: str = ""

    @property
    def position(self) -> str:
        """`file:line:column`, as far as it is known."""
        return ":".join(str(p) for p in (self.file, self.line, self.column) if p)

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.position, self.key, self.message) if part)
        if not self.hint:
            return text
        return f"{text} {self.hint}" if text.endswith((".", "?")) else f"{text}. {self.hint}"


class ProblemsError(MergeCliError):
    """Several problems found in one look, reported together."""

    def __init__(self, problems: Sequence[Problem], summary: str = "") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        self.summary = summary or f"{count} problem{'s' if count != 1 else ''}"
        super().__init__(self.summary)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {p}" for p in self.problems)])


class RecipeError(ProblemsError):
    """The recipe asks for something that does not exist or cannot be."""

    exit_code = 2
    title = "Recipe"


class UsageError(MergeCliError):
    """A flag or an argument that cannot be honoured."""

    exit_code = 2
    title = "Usage"


class SourceError(MergeCliError):
    """An input model or data file that cannot be used.

    Args:
        model: the source as the recipe names it.
        file: the file inside the model.
        tensor: the tensor inside the file.
    """

    exit_code = 3
    title = "Input"

    def __init__(
        self, message: str, *, model: str = "", file: str = "", tensor: str = "", hint: str = ""
    ) -> None:
        self.model, self.file, self.tensor = model, file, tensor
        where = ", ".join(part for part in (model, file, tensor) if part)
        super().__init__(message, where=where, hint=hint)


class CorruptFileError(SourceError):
    """A file that is truncated, or whose header or index does not describe it."""


class HubError(SourceError):
    """A Hub repository that is missing, private, gated, or not reachable."""


class RemoteError(SourceError):
    """A folder or file at an address that is missing, not allowed, not reachable, or changing."""


class NonFiniteError(SourceError):
    """NaN or Inf among the weights of a source."""


class MismatchError(ProblemsError):
    """Sources that cannot be merged with one another: names, shapes, vocabularies, dtypes."""

    exit_code = 3
    title = "Input"


class ResourceError(MergeCliError):
    """Not enough disk, memory or device, or a target that cannot be written."""

    exit_code = 4
    title = "Resources"


class GateError(MergeCliError):
    """A quality gate that the user set was not met."""

    exit_code = 5
    title = "Gate"


class UnexpectedError(MergeCliError):
    """What nobody has foreseen: a fault of this program, to be reported."""

    title = "Unexpected"


class Interrupted(MergeCliError):
    """Stopped by Ctrl-C or SIGTERM after the journal was closed."""

    exit_code = 130
    title = "Interrupted"
