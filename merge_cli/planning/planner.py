"""From a recipe to a plan, from headers alone: `make_plan` is a list of passes over a draft.

    recipe ─▶ open the models ─▶ Draft ─▶ pass ─▶ pass ─▶ ... ─▶ Plan

`_PASSES` is the table of contents. Every problem is reported here, before a byte of weights is
read; `engine/` executes what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.cards import read_card
from merge_cli.checkpoint.layout import lay_out
from merge_cli.errors import (
    RecipeError,
    UsageError,
)
from merge_cli.planning import passes
from merge_cli.planning.draft import Draft
from merge_cli.planning.encodings import described as encodings_described
from merge_cli.planning.encodings import left_out_tasks
from merge_cli.planning.given_statistics import open_statistics_folder
from merge_cli.planning.method_checks import check_recipe
from merge_cli.planning.opening import one_spelling, open_all, unopenable
from merge_cli.planning.plan import Plan, outputs_of
from merge_cli.planning.tasks import decide_tasks
from merge_cli.recipe.load import parse_documents, parse_text, read_recipe
from merge_cli.recipe.mapping import mapping_node
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source, require_safetensors
from merge_cli.system.garbage import uncollected

DEFAULT_SHARD_SIZE = 5_000_000_000  # transformers' default


def load_recipe(
    path: str | Path | Mapping[str, Any], *, text: str | None = None, folder: Path | None = None
) -> Recipe:
    """Read a recipe and check everything that can be checked without looking at a model.

    Args:
        path: the recipe's file; `-` reads standard input. Or the recipe itself, a mapping.
        text: the recipe itself, instead of the file's content.
        folder: where the relative paths of a mapping start; default the working directory.

    Raises:
        RecipeError: every problem, with file, line, column, key, and the nearest known word; those
            of a mapping have no line.
    """
    if isinstance(path, Mapping):
        recipe, problems = parse_documents([mapping_node(path)], "", folder or Path.cwd())
    elif text is not None:
        recipe, problems = parse_text(text, str(path), Path(path).parent)
    else:
        recipe, problems = read_recipe(path)
    if recipe is None:
        raise RecipeError(problems)
    documents = []
    for document in (*recipe.stages, *recipe.sweep.values(), recipe):
        document = one_spelling(document)
        checked = check_recipe(document)
        problems = [*problems, *checked.problems]
        warnings = document.warnings + checked.warnings
        documents.append(replace(document, warnings=warnings))
    if problems:
        problems += unopenable(recipe)
        raise RecipeError(sorted(set(problems), key=lambda p: (p.line, p.column, p.key)))
    *others, final = documents
    lines = (line for document in documents for line in document.warnings)
    sweep = dict(zip(recipe.sweep, others, strict=True)) if recipe.sweep else {}
    stages = () if recipe.sweep else tuple(others)
    return replace(final, stages=stages, sweep=sweep, warnings=tuple(dict.fromkeys(lines)))


@uncollected()
def make_plan(
    recipe: Recipe,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    made: Mapping[str, Source] | None = None,
    stages: Mapping[str, Plan] | None = None,
) -> Plan:
    """Decide every output tensor from headers.

    Args:
        made: the results of the recipe's stages that it merges, by name (see stages.py).
        stages: how they are made.

    Raises:
        UsageError: a recipe of several documents, without what the others make.
        SourceError: a model that cannot be opened.
        MismatchError: sources that do not fit one another, every problem at once.
        RecipeError: values that no tensor can be merged with.
    """
    if recipe.stages and stages is None:
        message = "this recipe has several documents: only `run` and `plan` read them"
        raise UsageError(message, where=recipe.file, hint="Run it, then name its result.")
    if recipe.sweep:
        message = "this recipe is a sweep: only `run`, `plan` and `compare` read it"
        raise UsageError(message, where=recipe.file, hint="Write a recipe for one of its variants.")
    draft = open_sources(recipe, made or {})
    for decide in _PASSES:
        draft = decide(draft)
    return _as_plan(draft, shard_size, stages or {})


def open_sources(recipe: Recipe, made: Mapping[str, Source]) -> Draft:
    """Open every model, once, whatever the recipe calls it.

    Raises:
        SourceError: a model that cannot be opened.
        MismatchError: several of them.
        RecipeError: two names of the recipe are one model, and the method takes more.
    """
    method = check_recipe(recipe).method
    assert method is not None, "load_recipe refuses a recipe without a method"
    recipe, sources = open_all(recipe, made)
    problems = check_recipe(recipe).problems  # again: two names may turn out to be one model
    if problems:
        raise RecipeError(problems)
    notes = [*recipe.notes]
    notes += [f"{source.label}: {note}" for source in sources for note in source.notes]
    for source in sources:
        if method.preparation:
            require_safetensors(source)
        _, why = read_card(source.root)
        if why:
            notes.append(f"{source.label}: {why}; its licence and languages are taken as unknown")
    return Draft(recipe, method, tuple(sources), notes=tuple(notes))


_PASSES: tuple[Callable[[Draft], Draft], ...] = (
    passes.cut_slices,
    passes.unify_layouts,
    passes.unify_prefixes,
    passes.unify_copies,
    passes.unify_heads,
    passes.align_vocabularies,
    passes.check_copied_files,
    passes.match_tensors,
    passes.compare_settings,
    decide_tasks,
    passes.open_coefficient_file,
    open_statistics_folder,
    passes.merge_config,
    passes.check_model,
    passes.note_leftovers,
)


def _as_plan(draft: Draft, shard_size: int, stages: Mapping[str, Plan]) -> Plan:
    """What is decided, with the output's tensors laid out in shards."""
    source = draft.sources[draft.config_index]
    tasks = left_out_tasks(draft.recipe, source, draft.config_index, draft.tasks)
    outputs = outputs_of(tasks)
    operands = dict.fromkeys(operand.source for part in draft.slices for operand in part.operands)
    if source.is_lone_file:  # one file in, one file out
        shard_size = sum(output.nbytes for output in outputs)
    plan = Plan(
        recipe=draft.recipe,
        method=draft.method,
        sources=(*draft.sources, *filter(None, [draft.aligned.guest])),
        base=draft.base,
        operands=tuple(operands),
        config_index=draft.config_index,
        aligned=draft.aligned,
        templates=draft.templates,
        tasks=tasks,
        shards=tuple(lay_out(outputs, shard_size, source.stems)),
        config=draft.config if source.config else {},
        notes=tuple(dict.fromkeys(draft.notes)),
        coefficients=draft.coefficients,
        calibrated=draft.calibrated,
        shard_size=shard_size,
        stages=stages,
        compared=draft.compared,
    )
    return encodings_described(plan)
