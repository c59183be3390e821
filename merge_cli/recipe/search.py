"""The `search:` section of a recipe whose parameters are to be found: ranges, layout, optimizer.

Which parameters a method has, and whether a range fits them, is the business of `methods`; what the
ranges mean for the layers of these models, of `evolve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from merge_cli.recipe.forms import Checked, MappingOf, Plain, Texts, any_of
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.sections import Key, Section, keys_of, option, section_of
from merge_cli.recipe.values import Scalar, filter_error

STARTS = ("best", "middle", "softmax")
TIES = ("models", "layers", "filters")


def _tied(value: Any) -> tuple[Any, str]:
    if isinstance(value, bool):
        return (tuple(TIES) if value else ()), ""
    words = [value] if isinstance(value, str) else value
    if isinstance(words, list) and all(word in TIES for word in words):
        return tuple(word for word in TIES if word in words), ""
    return None, f"must be true, or some of {', '.join(TIES)}"


def _choices(value: Any) -> tuple[Any, str]:
    fits = isinstance(value, list) and len(value) > 1
    if fits and all(isinstance(item, bool | int | float | str) for item in value):
        return tuple(value), ""
    return None, "must be a list of at least two values"


def _groups(value: Any) -> tuple[Any, str]:
    if type(value) is int and value >= 1:
        return value, ""
    if isinstance(value, list) and value and all(type(v) is int and v >= 1 for v in value):
        return tuple(value), ""
    return None, "must be a number of groups, or a list of numbers of layers"


def _shares(value: Any) -> tuple[Any, str]:
    fits = isinstance(value, list) and all(isinstance(v, float) and 0 < v < 1 for v in value)
    if fits and sorted(set(value)) == value:
        return tuple(value), ""
    return None, "must be a list of shares between 0 and 1, ascending"


_COUNT: Schema = {"type": "integer", "minimum": 1}
_SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_WORD: Schema = {"enum": list(TIES)}
_TIED = Checked(_tied, any_of({"type": "boolean"}, _WORD, {"type": "array", "items": _WORD}))
_CHOICES: Schema = {
    "type": "array",
    "items": {"type": ["boolean", "number", "string"]},
    "minItems": 2,
}
_GROUPS: Schema = any_of(_COUNT, {"type": "array", "items": _COUNT, "minItems": 1})


@dataclass(frozen=True)
class SearchedParameter:
    """One parameter of the inner method and where its values may lie.

    Attributes:
        low, high: both allowed; unused where there are `choices`.
        key: where it stands in the recipe.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = option(False, "equal ratios are equally likely, instead of equal differences")
    integer: bool = option(False, "whole numbers alone")
    choices: tuple[Scalar, ...] = option(
        (), "the values to choose from, instead of a range", form=Checked(_choices, _CHOICES)
    )
    # In one order: it is part of what a journal is known by.
    tied: tuple[str, ...] = option(
        (), "across what one value is shared: models, layers, filters; true is all", form=_TIED
    )
    key: str = ""

    @property
    def allowed(self) -> str:
        """The range in words."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        kind = ", whole" if self.integer else ""
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}{kind}"


_ENDS = {
    "min": Key(Plain(float), "the least value, itself allowed"),
    "max": Key(Plain(float), "the greatest value, itself allowed"),
}


def _range(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Any:
    """The parameter, still without its name; REFUSED where its keys do not go together."""
    given = {part: child for part, child in node.value.items() if part in _SECTION.keys}
    before = len(reader.problems)
    if len(values) < len(given):
        return REFUSED  # a part was refused, and what is said of the rest would be guessing
    if "choices" in given:
        for part in ("min", "max", "log", "integer"):
            if part in given:
                message = "has no meaning beside `choices`."
                reader.refuse(given[part], f"{key}.{part}", message, "Leave it out.")
        return values if len(reader.problems) == before else REFUSED
    for part in _ENDS:
        if part not in given:
            reader.refuse(node, f"{key}.{part}", "missing.", "Give `min` and `max`, or `choices`.")
    if len(reader.problems) > before:
        return REFUSED
    low, high = values.pop("min"), values.pop("max")
    integer, log = values.get("integer", False), values.get("log", False)
    if low >= high:
        message = f"must be above min (got {high:g}, and min {low:g})."
        reader.refuse(given["max"], f"{key}.max", message)
    if log and low <= 0:
        reader.refuse(given["min"], f"{key}.min", f"must be above 0 with `log` (got {low:g}).")
    if integer and (low != int(low) or high != int(high)):
        message = "min and max must be whole numbers with `integer`."
        reader.refuse(given["min"], f"{key}.min", message)
    if integer and log:
        message = "has no meaning beside `integer`."
        reader.refuse(given["log"], f"{key}.log", message, "Leave one of them out.")
    return {**values, "low": low, "high": high} if len(reader.problems) == before else REFUSED


_BESIDE_CHOICES = [{"required": [part]} for part in ("min", "max", "log", "integer")]
_SECTION = Section(
    {**_ENDS, **keys_of(SearchedParameter)},
    _range,
    null=True,
    rules={
        "oneOf": [
            {"required": ["choices"], "not": {"anyOf": _BESIDE_CHOICES}},
            {"required": ["min", "max"]},
        ]
    },
)


@dataclass(frozen=True)
class RangeForm(Form):
    """Where a parameter's values may lie."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if isinstance(node.value, dict):
            return _SECTION.read(node, key, reader)
        hint = "Give it {min: ..., max: ...}; a value that is fixed belongs to `parameters:`."
        return reader.refuse_type(node, key, "is no range", hint)

    def schema(self) -> Schema:
        return _SECTION.schema()


@dataclass(frozen=True)
class Ranges(MappingOf):
    """Parameters with their ranges, as a tuple."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        ranges = super().read(node, key, reader)
        return ranges if ranges is REFUSED else tuple(ranges.values())


_RANGES = Ranges(
    RangeForm(),
    "must be a mapping of parameters to ranges",
    "Write `weight: {min: 0, max: 1}`.",
    1,
    lambda name, values, key: SearchedParameter(name, **values, key=key),
)


@dataclass(frozen=True)
class LayerSearch:
    """Which layers are stacked, instead of parameters. None is explained by the help."""

    repeat: int = option(1, "how often the layers of all models stand in the sequence", 1)
    block: int = option(1, "neighbouring layers that are taken or left out together", 1)
    min: int | None = option(None, "layers of the result, at least; default half a model", 1)
    max: int | None = option(None, "layers of the result, at most; default one model and a half", 1)


def _layers(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Any:
    layers = LayerSearch(**{k: v for k, v in values.items() if v is not None})
    if layers.min is not None and layers.max is not None and layers.min > layers.max:
        message = f"must be at least min (got {layers.max}, and min {layers.min})."
        reader.refuse(node.value["max"], f"{key}.max", message)
        return REFUSED
    return layers


@dataclass(frozen=True)
class Search:
    """What is searched, and how. None is explained by the help."""

    method: tuple[str, ...] = option(
        (), "the method whose parameters are searched, or several", form=Texts(distinct=True)
    )
    parameters: tuple[SearchedParameter, ...] = option((), "ranges by parameter", form=_RANGES)
    layers: LayerSearch | None = option(
        None,
        "stack layers of the models, with `method: passthrough`: which, in the order of a sequence",
        form=section_of(LayerSearch, _layers, null=True),
    )
    layer_groups: int | tuple[int, ...] = option(
        1,
        "values over the layers: how many groups, or each group's number of layers",
        form=Checked(_groups, _GROUPS),
    )
    smooth: bool = option(False, "interpolate values between layer groups")
    filters: tuple[str, ...] = option(
        (),
        "parts of tensor names that get values of their own",
        form=Texts(check=filter_error, distinct=True),
    )
    optimizer: Literal["cma-es", "random", "tpe", "nsga2"] = option(
        "cma-es", "the algorithm that proposes candidates"
    )
    evaluations: int = option(100, "number of candidates in all", 1)
    population: int | None = option(
        None, "candidates of a generation; default 4 + 3 ln n, for n numbers", 2
    )
    sigma: float = option(1 / 6, "CMA-ES: the first step, as a share of each range", 1e-6, 1)
    restarts: int = option(0, "CMA-ES: how often to start again, with twice the population", 0)
    start: str = option(
        "best",
        "the first candidate: best (the best static merge that the space has), middle, softmax, "
        "or the file of a recipe or of an earlier search's journal",
    )
    temperature: float = option(
        1.0, "T of the weights softmax(-score/T), with start: softmax", 1e-6
    )
    finalists: int = option(5, "best candidates that the validation split chooses from", 1)
    rows: int = option(
        16,
        "rows of each loss or kl task without `limit` that a candidate is scored on; 0 for all; "
        "the last few are compared on all",
        0,
    )
    fidelity: tuple[float, ...] = option(
        (),
        "shares of the rows on which candidates are compared before all rows are used",
        form=Checked(_shares, {"type": "array", "items": _SHARE, "uniqueItems": True}),
    )
    keep: float = option(0.5, "share of a generation that survives a step of `fidelity`", 1e-6, 1)
    failures: int = option(8, "failed candidates in a row that stop the search", 1)
    engine: Literal["local", "ray"] = option("local", "where candidates are evaluated")
    workers: int = option(1, "processes, or actors, each with a model of its own", 1)
    asynchronous: bool = option(
        False, "propose a candidate as soon as a worker is free, instead of by generations"
    )
    given: frozenset[str] = frozenset()  # the keys that the recipe has
    in_space: bool = False  # whether only static merges that the space expresses may be the result


def _search(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Search:
    given = frozenset(node.value) & frozenset(SEARCH.keys)
    return Search(**{k: v for k, v in values.items() if v is not None}, given=given)


SEARCH = section_of(Search, _search, null=True)
# What changes no result; `given` is how the section was written.
INDIFFERENT = frozenset(("failures", "engine", "workers", "given"))
WITHOUT_SPACE = frozenset(("failures", "engine", "workers"))  # what greedy_soup takes
