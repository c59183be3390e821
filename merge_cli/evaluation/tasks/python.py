"""The task `python`: a user's function, called with the loaded model."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from merge_cli.checkpoint.fingerprint import file_fingerprint
from merge_cli.errors import MergeCliError, NonFiniteError, SourceError
from merge_cli.evaluation.forward import watched
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evaluation.task import OnProgress, Task
from merge_cli.recipe.forms import Text
from merge_cli.recipe.reference import expanded
from merge_cli.recipe.sections import option


@dataclass(frozen=True, kw_only=True)
class PythonTask(Task):
    """`function(net, tokenizer)` -> a number, or a list with a number for each example."""

    kind = "python"
    metrics = ("score",)
    is_cached = False  # the function may read anything
    not_in_identity = Task.not_in_identity | {"folder"}

    python: str = option(help="file.py:function", form=Text(line=True))
    better: Literal["lower", "higher"] = option("higher", "the direction of improvement")
    folder: Path = option(Path(), "where the file's relative path starts")

    def files(self) -> tuple[Path, ...]:
        return (self._file_and_name()[0],)

    def data_digest(self) -> str:
        path, name = self._file_and_name()
        return f"{file_fingerprint(path)} {name}"

    def check_data(self, seed: int) -> None:
        self._file_and_name()

    def score(self, live: LiveModel, on_progress: OnProgress) -> TaskResult:
        import torch

        function = self._function()
        try:
            with watched(live), torch.no_grad():
                result = function(live.net, live.tokenizer)
        except (MergeCliError, KeyboardInterrupt):  # about the model, and not about the function
            raise
        except BaseException as error:  # it can raise anything: sys.exit is a SystemExit
            message = f"raised {_described(error)}"
            raise SourceError(message, file=self.python) from error
        parts = self._numbers(result)
        metric = Metric("score", "by its own measure", self.better, parts, [1.0] * len(parts))
        examples = [{"number": i, "score": part} for i, part in enumerate(parts)]
        return TaskResult(self.name, self.kind, {"score": metric}, examples)

    def _numbers(self, result: Any) -> list[float]:
        """What the function has returned.

        Raises:
            SourceError: no number, or not only numbers.
            NonFiniteError: one that is NaN or infinite.
        """
        is_list = isinstance(result, list | tuple)
        listed = result if is_list else [result]
        wrong = [type(part).__name__ for part in listed if not _is_number(part)]
        if wrong or not listed:
            got = (
                f"a list with {wrong[0]}" if is_list and wrong else (wrong or ["an empty list"])[0]
            )
            message = f"must return a number, or a list of numbers (got {got})"
            raise SourceError(message, file=self.python, hint="Convert it: float(...).")
        try:
            parts = [float(part) for part in listed]
        except OverflowError:
            parts = [math.inf]
        for part in parts:
            if not math.isfinite(part):
                message = f"returned {part}, which is no score"
                raise NonFiniteError(message, file=self.python)
        return parts

    def _file_and_name(self) -> tuple[Path, str]:
        file, _, name = self.python.rpartition(":")
        path = self.folder / expanded(file)
        if not name.isidentifier() or not path.is_file():
            message = "names no function in a file" if path.is_file() else "no such file"
            raise SourceError(message, file=self.python, hint="Write `python: file.py:function`.")
        return path, name

    def _function(self) -> Callable[[Any, Any], Any]:
        path, name = self._file_and_name()
        spec = importlib.util.spec_from_file_location(f"merge_cli_task_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise SourceError("is not a Python file", file=self.python)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # as above
            message = f"cannot be imported: {_described(error)}"
            raise SourceError(message, file=str(path)) from error
        function: Callable[[Any, Any], Any] | None = getattr(module, name, None)
        if not callable(function):
            raise SourceError(f"has no function '{name}'", file=str(path))
        return function


def _described(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_number(value: Any) -> bool:
    """Whether it is a number of Python or numpy; a truth value is none."""
    return isinstance(value, Real) and not isinstance(value, bool)
