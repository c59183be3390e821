"""Generates short calculations with one exact answer: the task of zoo/smollm's arithmetic expert.

Two-digit sums and differences, and products of a one-digit and a two-digit number. The prompt
shows one solved sum first, so that a model which was never trained on the format can follow it.
As in arithmetic.py, a pair of operands, in either order and whatever the operation, belongs to
one side of the split.
"""

import random
from collections.abc import Iterator

from arithmetic import Step, side

SEED = 20261129
OPERATIONS = ("+", "-", "*")
EXAMPLE = "5 + 3 = 8\n"  # operands below 10: no calculation has this pair
_TWO_DIGITS = range(10, 100)
_ONE_DIGIT = range(2, 10)


def every(operation: str) -> list[Step]:
    """All calculations of one operation, in a fixed order; no difference is below zero."""
    if operation == "*":
        pairs = [(a, b) for a in _ONE_DIGIT for b in _TWO_DIGITS]
        pairs += [(b, a) for a, b in pairs]
    else:
        pairs = [(a, b) for a in _TWO_DIGITS for b in _TWO_DIGITS if operation == "+" or a >= b]
    return [Step(left, operation, right) for left, right in pairs]


def row(step: Step) -> dict[str, str]:
    """A calculation as a row: the answer, and the line's end, are what a model is asked for."""
    return {
        "prompt": f"{EXAMPLE}{step.left} {step.operation} {step.right} =",
        "completion": f" {step.result}\n",
    }


def calculations(split: str, seed: int = SEED) -> Iterator[Step]:
    """Endless calculations of one split, the operations in turn.

    Each operation's calculations come in a shuffled order; none comes twice before all have come.
    """
    rng = random.Random(f"{seed}:{split}")
    all_of = {
        operation: [step for step in every(operation) if side(step.pair, seed) == split]
        for operation in OPERATIONS
    }
    left: dict[str, list[Step]] = {operation: [] for operation in OPERATIONS}
    while True:
        for operation in OPERATIONS:
            if not left[operation]:
                left[operation] = rng.sample(all_of[operation], len(all_of[operation]))
            yield left[operation].pop()
