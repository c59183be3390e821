"""Generates arithmetic word problems with a worked step and a final `Answer: N`.

A problem has one or two steps over short operands. Multi-digit steps are worked through by
tens and ones, which a model of five million parameters can learn. Each operand pair, with its
commuted twin and whatever the operation, belongs to one side of the split: a problem is on the
side where all its pairs are, or is not generated at all.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

SEED = 20240612
NAMES = (
    "Mia",
    "Ken",
    "Lena",
    "Omar",
    "Yuki",
    "Tom",
    "Sara",
    "Ravi",
    "Emma",
    "Hana",
    "Paul",
    "Nora",
    "Luis",
    "Aya",
    "Ben",
    "Ida",
)
ITEMS = (
    "apples",
    "books",
    "coins",
    "stamps",
    "marbles",
    "pens",
    "cards",
    "shells",
    "eggs",
    "tickets",
    "stickers",
    "pears",
)
BOXES = ("boxes", "bags", "rows", "baskets", "drawers", "shelves")

ADD = (
    "{n} has {a} {i} and buys {b} more. How many {i} does {n} have now?",
    "{n} has {a} {i}. {m} gives {n} {b} more {i}. How many {i} does {n} have now?",
    "{n} found {a} {i} and {m} found {b} {i}. How many {i} did they find together?",
    "There are {a} {i} on the table and {b} {i} in the box. How many {i} are there in all?",
    "A shop sold {a} {i} in the morning and {b} {i} in the afternoon. How many {i} did it sell?",
    "{n} put {a} {i} next to {b} other {i}. What is the total number of {i}?",
    "{m} owns {b} {i} more than {n}. {n} owns {a} {i}. How many {i} does {m} own?",
    "On Monday {n} counted {a} {i}, on Tuesday {b} {i}. How many {i} is that altogether?",
)
SUBTRACT = (
    "{n} has {a} {i} and gives {b} to {m}. How many {i} does {n} have left?",
    "{n} had {a} {i} and lost {b} of them. How many {i} are left?",
    "There were {a} {i} in a shop. {n} bought {b} of them. How many {i} remain?",
    "{n} has {a} {i}. {m} has {b} {i}. How many more {i} does {n} have than {m}?",
    "{n} needs {a} {i} and already has {b}. How many {i} are missing?",
    "{m} owns {b} {i} fewer than {n}. {n} owns {a} {i}. How many {i} does {m} own?",
    "Of {a} {i}, {b} are broken. How many {i} are not broken?",
    "{n} and {m} have {a} {i} together. {m} has {b} of them. How many {i} does {n} have?",
)
MULTIPLY = (
    "{n} has {a} {x} with {b} {i} each. How many {i} does {n} have?",
    "There are {b} {i} in each of {a} {x}. How many {i} are there in all?",
    "{n} buys {a} {i} every day. How many {i} does {n} buy in {b} days?",
    "{n} has {b} {i}. {m} has {a} times as many. How many {i} does {m} have?",
    "{a} friends bring {b} {i} each. How many {i} do they bring together?",
    "A shop sells {b} {i} an hour. How many {i} does it sell in {a} hours?",
)
ADD_SUBTRACT = (
    "{n} has {a} {i}, buys {b} more and gives {c} to {m}. How many {i} does {n} have now?",
    "There were {a} {i} in a box. {n} put in {b} and took out {c}. How many {i} are in the box?",
    "{n} found {a} {i}, {m} found {b}. Together they lost {c}. How many {i} are left?",
)
MULTIPLY_ADD = (
    "{n} has {a} {x} with {b} {i} each and {c} single {i}. How many {i} does {n} have?",
    "{n} buys {a} packs of {b} {i}. {m} gives {n} {c} more. How many {i} does {n} have now?",
    "{a} friends bring {b} {i} each and {n} brings {c}. How many {i} do they bring in all?",
)


@dataclass(frozen=True)
class Step:
    """`left operation right`, with the operation one of + - *."""

    left: int
    operation: str
    right: int

    @property
    def result(self) -> int:
        if self.operation == "+":
            return self.left + self.right
        return self.left - self.right if self.operation == "-" else self.left * self.right

    @property
    def pair(self) -> tuple[int, int]:
        """The operands without their order: the same for a step and its commuted twin."""
        return min(self.left, self.right), max(self.left, self.right)

    def worked(self) -> str:
        """The step by tens and ones, e.g. `23 + 45: 20 + 40 = 60, 3 + 5 = 8, 60 + 8 = 68.`"""
        left, right, result = self.left, self.right, self.result
        whole = f"{left} {self.operation} {right}"
        tens, ones = right - right % 10, right % 10
        if min(self.pair) < 10 and self.operation != "*" or not tens or not ones:
            return f"{whole} = {result}."
        if self.operation == "+":
            a, b = left - left % 10, left % 10
            if not b:
                return f"{whole} = {result}."
            return (
                f"{whole}: {a} + {tens} = {a + tens}, {b} + {ones} = {b + ones}, "
                f"{a + tens} + {b + ones} = {result}."
            )
        if self.operation == "-":
            return f"{whole}: {left} - {tens} = {left - tens}, {left - tens} - {ones} = {result}."
        return (
            f"{whole}: {left} * {tens} = {left * tens}, {left} * {ones} = {left * ones}, "
            f"{left * tens} + {left * ones} = {result}."
        )


@dataclass(frozen=True)
class Problem:
    prompt: str
    completion: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result


def side(pair: tuple[int, int], seed: int = SEED) -> str:
    """The split that an operand pair belongs to, in either order."""
    digest = hashlib.sha256(f"{seed}:{min(pair)},{max(pair)}".encode()).digest()
    place = digest[0] / 256
    return "test" if place < 0.15 else "val" if place < 0.25 else "train"


def _draw(kind: int, rng: random.Random) -> tuple[tuple[str, ...], tuple[Step, ...]]:
    if kind == 0:
        return ADD, (Step(rng.randint(2, 49), "+", rng.randint(2, 49)),)
    if kind == 1:
        left = rng.randint(11, 99)
        return SUBTRACT, (Step(left, "-", rng.randint(2, left - 2)),)
    if kind == 2:
        return MULTIPLY, (Step(rng.randint(2, 9), "*", rng.randint(3, 19)),)
    if kind == 3:
        first = Step(rng.randint(5, 49), "+", rng.randint(2, 49))
        return ADD_SUBTRACT, (first, Step(first.result, "-", rng.randint(2, first.result - 2)))
    first = Step(rng.randint(2, 9), "*", rng.randint(3, 9))
    return MULTIPLY_ADD, (first, Step(first.result, "+", rng.randint(2, 25)))


def _word(templates: tuple[str, ...], steps: tuple[Step, ...], rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    operands = {"a": steps[0].left, "b": steps[0].right, "c": steps[-1].right}
    question = rng.choice(templates).format(
        n=name, m=other, i=rng.choice(ITEMS), x=rng.choice(BOXES), **operands
    )
    worked = " ".join(step.worked() for step in steps)
    completion = f" {worked}\nAnswer: {steps[-1].result}"
    return Problem(f"Question: {question}\nSolution:", completion, steps)


def problems(split: str, seed: int = SEED) -> Iterator[Problem]:
    """Endless distinct problems of one split, in an order fixed by the seed."""
    rng = random.Random(f"{seed}:{split}")
    prompts: set[str] = set()
    while True:
        kind = rng.choices(range(5), weights=(3, 3, 3, 1, 1))[0]
        templates, steps = _draw(kind, rng)
        while any(side(step.pair, seed) != split for step in steps):
            templates, steps = _draw(kind, rng)
        problem = _word(templates, steps, rng)
        if problem.prompt not in prompts:
            prompts.add(problem.prompt)
            yield problem
