"""Columns give what the same work gives tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import example, given, settings
from hypothesis import strategies as st

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.layout import natural_key, natural_order
from merge_cli.checkpoint.tensors import has_names, in_order
from merge_cli.errors import MergeCliError
from merge_cli.planning import match, tasks, totals
from merge_cli.planning.draft import Draft
from merge_cli.planning.layers import layer_key_of, layers_of
from merge_cli.planning.method_checks import check_recipe
from merge_cli.planning.passes import cut_slices, match_tensors
from merge_cli.planning.planner import load_recipe
from merge_cli.planning.tasks import decide_tasks
from merge_cli.sources.source import Source
from merge_cli.tokenizer.aligned import AlignedVocabulary

NAMES = [
    "embed", "layers.0.up", "layers.1.up", "layers.1.attn.masked_bias", "layers.2.up", "norm",
    "tower.3.w", "9.w",
]  # fmt: skip
SHAPES = st.sampled_from([(4, 4), (4, 4), (4, 4), (2, 4), ()])
DTYPES = st.sampled_from(["BF16", "BF16", "BF16", "F32", "F16", "I64"])
ENTRIES = st.dictionaries(st.sampled_from(NAMES), st.tuples(SHAPES, DTYPES), min_size=1)
ALIKE: st.SearchStrategy[Any] = st.tuples(ENTRIES, st.just({}), st.just({}))
DIFFERENT = st.tuples(ENTRIES, ENTRIES, ENTRIES)
WEIGHTS = st.sampled_from(["1", "[0, 1]", "[{filter: up, value: 1}, {value: 0.5}]", "0"])
METHODS = st.sampled_from(
    ["linear", "task_arithmetic\nbase_model: a", "slerp", "passthrough", "ties\nbase_model: a"]
)
TEXTS = st.lists(st.text("019ab.-\n", max_size=7), unique=True, max_size=9)


def source(label: str, entries: dict[str, tuple[tuple[int, ...], str]]) -> Source:
    root = Path("/nowhere") / label
    tensors = {
        name: TensorRef(name, root / f"{dtype}.safetensors", dtype, shape, 0, len(name))
        for name, (shape, dtype) in entries.items()
    }
    return Source(label, root, {"num_hidden_layers": 3}, tensors, {})


def planned(text: str, models: tuple[dict[str, Any], ...]) -> Any:
    """Tasks and notes of a recipe over headers; or what is wrong."""
    try:
        recipe = load_recipe("recipe.yaml", text=text)
        sources = [source(label, entries) for label, entries in zip("abc", models, strict=True)]
        views = tuple(model.tensors for model in sources)
        method = check_recipe(recipe).method
        assert method is not None
        aligned = AlignedVocabulary(views, 0)
        start = Draft(recipe, method, tuple(sources), tensors=views, aligned=aligned)
        draft = decide_tasks(match_tensors(cut_slices(start)))
    except MergeCliError as error:
        return str(error), [str(problem) for problem in getattr(error, "problems", ())]
    matches = draft.matches
    beyond = [*matches.in_layers(lambda position: position.beyond)]
    assert beyond == [match for match in matches.matches if match.layer_position.beyond]
    return draft.tasks, draft.notes, matches.matches


@settings(deadline=None)
@given(METHODS, st.lists(WEIGHTS, min_size=3, max_size=3), st.one_of(ALIKE, DIFFERENT))
def test_a_plan_is_that_of_tensors_one_by_one(
    method: str, weights: list[str], models: tuple[dict[str, Any], ...]
) -> None:
    models = (models[0], {**models[0], **models[1]}, {**models[0], **models[2]})
    few = {"slerp": "bc", "passthrough": "b"}.get(method, "bc" if "base" in method else "abc")
    listed = "\n".join(
        f"- {{model: {label}, parameters: {{weight: {weight}}}}}"
        if method not in ("slerp", "passthrough")
        else f"- {{model: {label}}}"
        for label, weight in zip(few, weights, strict=False)
    )
    text = f"merge_method: {method}\nmodels:\n{listed}\n"
    text += "parameters: {t: 0.5}\n" if method == "slerp" else ""
    by_columns = planned(text, models)
    with (
        patch.object(match, "_match_alike", lambda *_: []),
        patch.object(tasks, "_tasks_alike", lambda *_: []),
    ):
        assert planned(text, models) == by_columns


@given(st.one_of(ALIKE, DIFFERENT))
def test_totals_are_those_of_tasks_one_by_one(models: tuple[dict[str, Any], ...]) -> None:
    models = (models[0], {**models[0], **models[1]}, {**models[0], **models[2]})
    text = "merge_method: task_arithmetic\nbase_model: a\nmodels: [b, c]\n"
    decided, *_ = planned(text, models)
    decided = decided if isinstance(decided, tuple) else ()
    inputs = [tensor for task in decided for tensor in task.inputs]
    computed = [task for task in decided if not task.moved]
    read = totals.input_totals(decided)
    assert read.nbytes == sum(task.bytes_read for task in decided)
    assert set(read.files) == {ref.path for tensor in inputs for ref in tensor.stored}
    assert not read.derived
    assert totals.element_count(decided) == sum(task.size for task in decided)
    assert totals.largest(decided) == max((task.size for task in decided), default=0)
    assert totals.most_inputs(decided) == max((len(task.inputs) for task in decided), default=1)
    assert [*totals.computed_of(decided)] == computed
    dtypes = {tensor.dtype for task in computed for tensor in task.inputs}
    assert totals.dtypes_of(computed) == dtypes | {task.dtype for task in computed}


@given(TEXTS)
def test_natural_order_is_that_of_the_keys(names: list[str]) -> None:
    assert [names[i] for i in natural_order(names)] == sorted(names, key=natural_key)


@given(TEXTS)
@example(["1.w", "1.2.w", ".1.w", ".1."])
@example(["a.1.w", "a.1.w\n", "a.1.w\nb", "a.1."])
def test_layers_are_found_at_once_as_one_by_one(names: list[str]) -> None:
    keys = [layer_key_of(name) for name in names]
    assert layers_of(names) == [key and (key.stack, key.number) for key in keys]


@given(st.permutations(NAMES), st.sets(st.sampled_from(NAMES)))
def test_names_and_their_order(order: list[str], names: set[str]) -> None:
    tensors = source("a", {name: ((), "F32") for name in order if name in names}).tensors
    assert has_names(tensors, order) == (names == set(order))
    assert [ref.name for ref in in_order(tensors, sorted(names))] == sorted(names)
