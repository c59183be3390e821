"""The task `python`: a user's function, called with the loaded model."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merge_cli.checkpoint.fingerprint import file_fingerprint
from merge_cli.errors import MergeCliError, SourceError
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
        except MergeCliError:  # about the model, and not about the function
            raise
        except Exception as error:  # a user's function can raise anything
            message = f"raised {type(error).__name__}: {error}"
            raise SourceError(message, file=self.python) from error
        parts = list(result) if isinstance(result, list | tuple) else [result]
        if not parts or not all(_is_number(part) for part in parts):
            message = f"must return a number, or a list of numbers (got {result!r})"
            raise SourceError(message, file=self.python)
        parts = [float(part) for part in parts]
        metric = Metric("score", "by its own measure", self.better, parts, [1.0] * len(parts))
        examples = [{"number": i, "score": part} for i, part in enumerate(parts)]
        return TaskResult(self.name, self.kind, {"score": metric}, examples)

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
        except Exception as error:  # a user's function can raise anything
            message = f"cannot be imported: {type(error).__name__}: {error}"
            raise SourceError(message, file=str(path)) from error
        function: Callable[[Any, Any], Any] | None = getattr(module, name, None)
        if not callable(function):
            raise SourceError(f"has no function '{name}'", file=str(path))
        return function


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) or value != value
