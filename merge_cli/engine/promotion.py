"""The dtype of a tensor whose sources have several, where the recipe names none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_cli.checkpoint.header import DTYPES, MERGEABLE, promoted
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.engine.plan import TensorTask
from merge_cli.recipe.schema import Recipe


def promoted_dtype(like: Tensor, operands: Sequence[Tensor]) -> str:
    """The dtype that a tensor has where the recipe names none."""
    natives = {like.native, *(ref.native for ref in operands)}
    return natives.pop() if len(natives) == 1 else promoted(natives)


def promotion_note(recipe: Recipe, tasks: Sequence[TensorTask]) -> Iterator[str]:
    """A line where sources of several dtypes make one that some of them do not have."""
    mixed = [task for task in tasks if task.note.startswith("stored as ")]
    if mixed and recipe.output_dtype is None:
        widest = promoted({task.dtype for task in mixed if task.dtype in MERGEABLE} or {"F32"})
        yield (
            f"sources differ in dtype in {len(mixed)} tensors, written in the wider one "
            f"({DTYPES[widest][1]}), as mergekit does; `dtype:` chooses another"
        )
