"""The `search:` section of a recipe whose parameters are to be found: ranges, layout, optimizer.

Which parameters a method has, and whether a range fits them, is the business of `methods`; what the
ranges mean for the layers of these models, of `evolve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

from merge_cli.recipe.fields import nearest
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.training import Refuse, option, read_value, words_of
from merge_cli.recipe.values import Scalar, filter_error

TIES = ("models", "layers", "filters")
_RANGE_KEYS = ("min", "max", "log", "integer", "choices", "tied")


@dataclass(frozen=True)
class SearchedParameter:
    """One parameter of the inner method and where its values may lie.

    Attributes:
        low, high: both allowed; unused where there are `choices`.
        log: equal ratios are equally likely, instead of equal differences.
        tied: across what one value is shared: models, layers, filters.
        key: where it stands in the recipe.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False
    choices: tuple[Scalar, ...] = ()
    tied: tuple[str, ...] = ()  # in one order: it is part of what a journal is known by
    key: str = ""

    @property
    def allowed(self) -> str:
        """The range in words."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        kind = ", whole" if self.integer else ""
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}{kind}"


@dataclass(frozen=True)
class Search:
    """What is searched, and how. None is explained by the help."""

    method: tuple[str, ...] = option((), "the method whose parameters are searched, or several")
    parameters: tuple[SearchedParameter, ...] = option((), "ranges by parameter")
    layer_groups: int | tuple[int, ...] = option(
        1, "values over the layers: how many groups, or each group's number of layers"
    )
    smooth: bool = option(False, "values between groups are interpolated, instead of stepping")
    filters: tuple[str, ...] = option((), "parts of tensor names that get values of their own")
    optimizer: Literal["cma-es", "random", "tpe", "nsga2"] = option("cma-es", "who proposes")
    evaluations: int = option(100, "candidates in all", 1)
    population: int | None = option(
        None, "candidates of a generation; default 4 + 3 ln n, for n numbers", 2
    )
    sigma: float = option(1 / 6, "CMA-ES: the first step, as a share of each range", 1e-6, 1)
    restarts: int = option(0, "CMA-ES: how often to start again, with twice the population", 0)
    start: str = option("middle", "the first candidate: middle, softmax, or a recipe's file")
    temperature: float = option(
        1.0, "T of the weights softmax(-score/T), with start: softmax", 1e-6
    )
    finalists: int = option(5, "best candidates that the validation split chooses from", 1)
    fidelity: tuple[float, ...] = option(
        (), "shares of the rows on which a generation is thinned out before all rows are used"
    )
    keep: float = option(0.5, "share of a generation that survives each of them", 1e-6, 1)
    failures: int = option(8, "failed candidates in a row that stop the search", 1)
    engine: Literal["local", "ray"] = option("local", "where candidates are evaluated")
    workers: int = option(1, "processes, or actors, each with a model of its own", 1)
    asynchronous: bool = option(
        False, "propose a candidate as soon as a worker is free, instead of by generations"
    )
    given: frozenset[str] = frozenset()  # the keys that the recipe has


SEARCH_KEYS = tuple(f.name for f in fields(Search) if f.name != "given")
WITHOUT_SPACE = frozenset(("failures", "engine", "workers"))  # what greedy_soup takes


def parse_search(children: Mapping[str, Node], key: str, refuse: Refuse) -> Search:
    """The section's children; wrong values are refused where they stand."""
    hints = get_type_hints(Search)
    about = {f.name: f.metadata for f in fields(Search)}
    given: dict[str, Any] = {}
    for name, node in children.items():
        path = f"{key}.{name}"
        if name == "parameters":
            given[name] = _ranges(node, path, refuse)
            continue
        if name in ("method", "filters"):
            value, wrong = _texts(node)
            if name == "filters" and not wrong:
                wrong = next(filter(None, map(filter_error, value)), "")
        elif name == "layer_groups":
            value, wrong = _groups(node)
        elif name == "fidelity":
            value, wrong = _shares(node)
        elif name == "start":
            value, wrong = node.value, "" if isinstance(node.value, str) else "must be text"
        else:
            value, wrong = read_value(node, hints[name])
            wrong = wrong or _bounded(value, about[name]["least"], about[name]["most"])
        if wrong:
            words = words_of(hints[name])
            hint = nearest(str(node.value), words) if words else ""
            refuse(node, path, f"{wrong} (got {node.plain()!r}).", hint)
        elif value is not None:
            given[name] = value
    return Search(**given, given=frozenset(children))


def _ranges(node: Node, key: str, refuse: Refuse) -> tuple[SearchedParameter, ...]:
    if not isinstance(node.value, dict) or not node.value:
        hint = "Write `weight: {min: 0, max: 1}`."
        refuse(node, key, "must be a mapping of parameters to ranges.", hint)
        return ()
    found = [_range(name, child, f"{key}.{name}", refuse) for name, child in node.value.items()]
    return tuple(item for item in found if item is not None)


def _range(name: str, node: Node, key: str, refuse: Refuse) -> SearchedParameter | None:
    if not isinstance(node.value, dict):
        hint = "Give it {min: ..., max: ...}; a value that is fixed belongs to `parameters:`."
        refuse(node, key, f"is no range (got {node.plain()!r}).", hint)
        return None
    fine = True

    def wrong(place: Node, part: str, what: str, hint: str = "") -> None:
        nonlocal fine
        fine = False
        refuse(place, f"{key}.{part}" if part else key, what, hint)

    for part, child in node.value.items():
        if part not in _RANGE_KEYS:
            line, column = node.key_places[part]
            wrong(Node(child.value, line, column), part, "unknown key.", nearest(part, _RANGE_KEYS))
    parts = {part: child for part, child in node.value.items() if part in _RANGE_KEYS}
    flags: dict[str, Any] = {}
    for part in ("log", "integer"):
        flags[part] = parts[part].value if part in parts else False
        if not isinstance(flags[part], bool):
            wrong(parts[part], part, f"must be true or false (got {flags[part]!r}).")
    tied = _tied(parts["tied"], wrong) if "tied" in parts else ()
    if "choices" in parts:
        choices = _choices(parts["choices"], wrong)
        for part in ("min", "max", "log", "integer"):
            if part in parts:
                wrong(parts[part], part, "has no meaning beside `choices`.", "Leave it out.")
        return SearchedParameter(name, choices=choices, tied=tied, key=key) if fine else None
    ends = {}
    for part in ("min", "max"):
        if part not in parts:
            wrong(node, part, "missing.", "Give `min` and `max`, or `choices`.")
            continue
        ends[part], why = read_value(parts[part], float)
        if why:
            wrong(parts[part], part, f"{why} (got {parts[part].plain()!r}).")
    if not fine:
        return None
    low, high = ends["min"], ends["max"]
    if low >= high:
        wrong(parts["max"], "max", f"must be above min (got {high:g}, and min {low:g}).")
    if flags["log"] and low <= 0:
        wrong(parts["min"], "min", f"must be above 0 with `log` (got {low:g}).")
    if flags["integer"] and (low != int(low) or high != int(high)):
        wrong(parts["min"], "min", "min and max must be whole numbers with `integer`.")
    if flags["integer"] and flags["log"]:
        wrong(parts["log"], "log", "has no meaning beside `integer`.", "Leave one of them out.")
    if not fine:
        return None
    return SearchedParameter(name, low, high, flags["log"], flags["integer"], tied=tied, key=key)


def _tied(node: Node, wrong: Any) -> tuple[str, ...]:
    if isinstance(node.value, bool):
        return tuple(TIES) if node.value else ()
    words = [node.value] if isinstance(node.value, str) else node.plain()
    if isinstance(words, list) and all(word in TIES for word in words):
        return tuple(word for word in TIES if word in words)
    wrong(node, "tied", f"must be true, or some of {', '.join(TIES)} (got {node.plain()!r}).")
    return ()


def _choices(node: Node, wrong: Any) -> tuple[Scalar, ...]:
    values = node.plain()
    fits = isinstance(values, list) and len(values) > 1
    if fits and all(isinstance(value, bool | int | float | str) for value in values):
        return tuple(values)
    wrong(node, "choices", f"must be a list of at least two values (got {values!r}).")
    return ()


def _texts(node: Node) -> tuple[Any, str]:
    words = [node.value] if isinstance(node.value, str) else node.plain()
    if isinstance(words, list) and words and all(isinstance(w, str) and w for w in words):
        twice = len(set(words)) < len(words)
        return (None, "names one twice") if twice else (tuple(words), "")
    return None, "must be a text or a list of texts"


def _groups(node: Node) -> tuple[Any, str]:
    value = node.plain()
    if type(value) is int and value >= 1:
        return value, ""
    if isinstance(value, list) and value and all(type(v) is int and v >= 1 for v in value):
        return tuple(value), ""
    return None, "must be a number of groups, or a list of numbers of layers"


def _shares(node: Node) -> tuple[Any, str]:
    values = node.plain()
    if (
        isinstance(values, list)
        and all(isinstance(v, float) and 0 < v < 1 for v in values)
        and sorted(set(values)) == values
    ):
        return tuple(values), ""
    return None, "must be a list of shares between 0 and 1, ascending"


def _bounded(value: Any, least: float | None, most: float | None) -> str:
    if value is None or isinstance(value, bool | str):
        return ""
    if least is not None and value < least:
        return f"must be at least {least:g}"
    return f"must be at most {most:g}" if most is not None and value > most else ""
