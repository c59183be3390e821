"""NaN and Inf among a block's weights, and what float16 cannot hold: counted, or refused."""

from __future__ import annotations

from typing import Any

from merge_cli.checkpoint.non_finite import non_finite_error
from merge_cli.engine.merge_stats import TensorStats
from merge_cli.errors import NonFiniteError
from merge_cli.kernels.backend import is_finite
from merge_cli.methods.blocks import Block
from merge_cli.planning.plan import TensorTask


def check_finite(block: Block, task: TensorTask, stats: TensorStats, *, allowed: bool) -> None:
    """Count what is NaN or Inf in each operand of a block.

    Raises:
        NonFiniteError: there is some, in an operand or the base, unless they are allowed.
    """
    counts = [0] * len(block.operands)
    if not block.finite:
        counts = [_count_non_finite(operand) for operand in block.operands]
        if not allowed:
            raise _error(block, task, counts)
    stats.add(TensorStats(non_finite=counts))


def refuse_infinity(task: TensorTask, block: Block, *, allowed: bool) -> None:
    """float16 ends at 65504: what is larger would be written as Inf.

    Raises:
        NonFiniteError: what was merged of a block without NaN or Inf does not fit, unless Inf is
            allowed.
    """
    if block.finite and not allowed:
        message = "some merged weights are too large for float16"
        hint = "Use bfloat16 or float32 as dtype, or accept Inf with --allow-non-finite."
        raise NonFiniteError(message, tensor=task.name, hint=hint)


def _error(block: Block, task: TensorTask, counts: list[int]) -> NonFiniteError:
    in_base = block.base is not None and _count_non_finite(block.base) > 0
    if in_base and task.base is not None:
        ref, values = task.base, block.base
    else:
        bad = next(i for i, count in enumerate(counts) if count)
        ref, values = task.operands[bad], block.operands[bad]
    element = _first_non_finite(values) + block.at.start
    return non_finite_error(
        ref,
        element,
        hint="Replace the file, or accept it with --allow-non-finite.",
        together="Leave one of them out, or accept it with --allow-non-finite.",
    )


def _count_non_finite(values: Any) -> int:
    return int((~is_finite(values)).sum())


def _first_non_finite(values: Any) -> int:
    return int((~is_finite(values)).nonzero()[0][0])  # torch's argmax refuses booleans
