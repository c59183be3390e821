"""The specification of an evaluation: tasks, and how to run them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_cli.errors import UsageError
from merge_cli.evaluation.task import Task
from merge_cli.recipe.fields import nearest

if TYPE_CHECKING:
    from merge_cli.sources.source import Source

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvalSpec:
    """An evaluation, from a file or from flags.

    Attributes:
        seed: of row samples and few-shot examples.
        max_length: tokens of context; None is the model's own.
        batch_tokens: tokens of one batch, padding included.
        dtype: of the computation: auto, float32, bfloat16, float16.
        device: auto, cpu, cuda or cuda:N.
        memory: bytes that weights may take; None is what is free.
        threads: of torch, on a CPU; None leaves them as they are.
        cache: whether results are read from the cache and written to it.
    """

    tasks: tuple[Task, ...]
    seed: int = 0
    max_length: int | None = None
    batch_tokens: int = 8192
    dtype: str = "auto"
    device: str = "auto"
    memory: int | None = None
    threads: int | None = None
    cache: bool = True
    file: str = ""

    def changed(self, **settings: object) -> EvalSpec:
        """With the settings that are not None.

        Raises:
            UsageError: an unknown dtype; a number below one.
        """
        present = {name: value for name, value in settings.items() if value is not None}
        dtype = present.get("dtype", self.dtype)
        if dtype not in ("auto", *DTYPES):
            names = ("auto", *DTYPES)
            raise UsageError(f"unknown dtype '{dtype}'.", hint=nearest(str(dtype), names))
        for name in ("threads", "max_length", "batch_tokens"):
            given = present.get(name)
            if isinstance(given, int) and given < 1:
                raise UsageError(f"{name} must be at least 1, not {given}")
        return replace(self, **present)  # type: ignore[arg-type]  # fields by name

    def files(self) -> list[Path]:
        """The files that it is read from, and those that its tasks read."""
        file = [Path(self.file)] if self.file else []
        return [*file, *(path for task in self.tasks for path in task.files())]

    def models(self) -> list[Source]:
        """The models that its tasks read besides the one that is evaluated."""
        return [model for task in self.tasks for model in task.models()]

    def limited(self, limit: int | None) -> EvalSpec:
        """With at most `limit` rows of each task; as it is for None.

        Raises:
            UsageError: fewer rows than one.
        """
        if limit is None:
            return self
        if limit < 1:
            raise UsageError(f"limit must be at least 1, not {limit}")
        return replace(self, tasks=tuple(replace(task, limit=limit) for task in self.tasks))


def default_name(data: Path | str) -> str:
    """A task's name from its data: `math` for math.test.jsonl."""
    name = Path(data).name
    return name.split(".")[0] or name
