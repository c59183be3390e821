"""From a recipe to a plan, from headers alone: `make_plan` is a list of passes over a draft.

    recipe ─▶ open the models ─▶ Draft ─▶ pass ─▶ pass ─▶ ... ─▶ Plan

`_PASSES` is the table of contents. Every problem is reported here, before a byte of weights is
read; `engine/` executes what comes out.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import check_links, named_code, read_card
from merge_cli.checkpoint.coefficients import open_coefficients
from merge_cli.checkpoint.config import merged_config, text_config, with_layer_types
from merge_cli.checkpoint.dtypes import DTYPES, MERGEABLE
from merge_cli.checkpoint.layer_config import LAYER_COUNTS
from merge_cli.checkpoint.layout import lay_out, natural_key
from merge_cli.errors import (
    MismatchError,
    Problem,
    RecipeError,
    UsageError,
)
from merge_cli.planning.aliases import join_aliases
from merge_cli.planning.config_notes import config_notes
from merge_cli.planning.draft import Draft
from merge_cli.planning.encodings import described as encodings_described
from merge_cli.planning.encodings import left_out_tasks
from merge_cli.planning.heads import head_problems, reconcile_heads
from merge_cli.planning.layouts import lay_out_alike
from merge_cli.planning.match import match_pieces
from merge_cli.planning.opening import files_of, one_spelling, open_all, unopenable
from merge_cli.planning.output_slices import (
    described,
    left_out,
    origins_of,
    output_slices,
    stacked_slices,
)
from merge_cli.planning.plan import Plan, sliced_names
from merge_cli.planning.prefixes import rename
from merge_cli.planning.resolve import beyond_note, check_recipe, unused_filters
from merge_cli.planning.structure import check_structure
from merge_cli.planning.tasks import decide_tasks
from merge_cli.recipe.load import parse_documents, parse_text, read_recipe
from merge_cli.recipe.mapping import mapping_node
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source, require_safetensors
from merge_cli.tokenizer.alignment import align
from merge_cli.tokenizer.chat_template import choose_template
from merge_cli.tokenizer.conversion import check_companions
from merge_cli.tokenizer.renumbering import renumber, vocabulary_notes

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


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles.

    A plan is a million objects and no garbage; looking at all of them again and again takes a third
    of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
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


def cut_slices(draft: Draft) -> Draft:
    """Which layers of which sources each part of the output is made of."""
    slices = output_slices(draft.recipe, draft.method, draft.labels)
    draft = replace(draft, slices=tuple(slices))
    if draft.base is not None:
        return draft
    label = draft.sources[draft.config_index].label
    note = f"config.json and tokenizer come from {label}, listed first"
    return replace(draft, notes=(note, *draft.notes))


def unify_layouts(draft: Draft) -> Draft:
    """Experts one by one or stacked, and names that have changed: all as in the reference."""
    relaid = lay_out_alike(draft.sources, draft.reference)
    return draft.with_sources(relaid.sources, relaid.notes)


def unify_prefixes(draft: Draft) -> Draft:
    """The language model inside a multimodal one takes the reference's names."""
    if not draft.recipe.models:
        return draft
    renamed = rename(draft.sources, draft.reference)
    return draft.with_sources(renamed.sources, renamed.notes)


def unify_copies(draft: Draft) -> Draft:
    """Tied weights that files store several times: every source has those of the reference."""
    aliases = join_aliases(draft.sources, draft.reference)
    draft = draft.with_sources(aliases.sources, aliases.notes)
    return replace(draft, copy_of=aliases.of, copies=(*draft.copies, *aliases.stored))


def unify_heads(draft: Draft) -> Draft:
    """Either every source has an output head or none has.

    Raises:
        MismatchError: classifiers among language models.
    """
    problems = head_problems(draft.sources)
    if problems:
        raise MismatchError(problems, "the models have different heads")
    heads = reconcile_heads(draft.sources)
    copies = (*draft.copies, *heads.stored)
    return draft.noting(heads.notes, tensors=heads.views, tied=heads.tied, copies=copies)


def align_vocabularies(draft: Draft) -> Draft:
    """Embeddings and heads in the order of one vocabulary, as far as the recipe asks for it."""
    aligned = align(draft.recipe, draft.sources, draft.tensors, draft.base, draft.config_index)
    return draft.noting(aligned.notes, aligned=aligned)


def check_copied_files(draft: Draft) -> Draft:
    """The files that are copied beside the weights can be, and hold what their names promise."""
    givers = draft.sources[draft.config_index], draft.tokenizer_source
    check_links(givers[0].root, givers[1].root, (givers[0].label, givers[1].label))
    check_companions(*givers)
    return draft


def match_tensors(draft: Draft) -> Draft:
    """Which tensors of the sources make which output tensor.

    Raises:
        MismatchError: everything that does not fit.
    """
    matches = match_pieces(draft.slices, draft.sources, draft.aligned.views)
    if matches.problems:
        count = len(matches.problems)
        summary = f"the sources do not fit one another ({count} problem{'s' * (count != 1)})"
        types = dict.fromkeys(s.config.get("model_type") for s in draft.sources)
        if len(types) > 1 and None not in types:
            summary += f": the architectures differ ({', '.join(map(str, types))})"
        summary += _differences(draft.sources)
        placed = (_placed(problem, draft.recipe) for problem in matches.problems)
        ordered = sorted(placed, key=lambda problem: natural_key(problem.key))
        raise MismatchError(ordered, summary)
    return replace(draft, matches=matches)


def compare_settings(draft: Draft) -> Draft:
    """Differences between configs and tokenizers that merging does not reconcile."""
    recipe, sources = draft.recipe, draft.sources
    template, template_notes = choose_template(recipe, sources)
    vocabularies = vocabulary_notes(sources) if recipe.tokenizer is None else ()
    notes = (*config_notes(sources, draft.config_index), *vocabularies, *template_notes)
    return draft.noting(notes, template=template)


def open_coefficient_file(draft: Draft) -> Draft:
    """The recipe's file of coefficients.

    Raises:
        MismatchError: it does not fit every merged tensor.
    """
    recipe = draft.recipe
    path = local_file(recipe.coefficients, recipe.folder) if recipe.coefficients else None
    if path is None:
        return draft
    coefficients = open_coefficients(path)
    problems = [
        Problem(problem, task.name)
        for task in draft.tasks
        if task.action == "merge"
        for problem in coefficients.problems(task.formula_name, task.shape, len(task.operands))
    ]
    if problems:
        raise MismatchError(problems, f"{path.name} does not fit these models")
    return replace(draft, coefficients=coefficients)


def merge_config(draft: Draft) -> Draft:
    """The output's config.json: the dtype, tied weights, numbers of layers and of tokens.

    Raises:
        RecipeError: layers that config.json could not describe.
    """
    recipe, sources, keys = draft.recipe, draft.sources, draft.matches.layer_keys
    source = sources[draft.config_index]
    config, left_out_notes = source.config, list[str]()
    stacked = stacked_slices(recipe, draft.slices, sources)
    if stacked:
        config = with_layer_types(config, source.root)
        config, left_out_notes = left_out(config, stacked, sources, keys)
    doubts: list[str] = []
    origins = origins_of(stacked, sources, keys, doubts) if stacked else None
    dtypes = {task.dtype for task in draft.tasks if task.dtype in MERGEABLE}
    config, changes = merged_config(
        config,
        dtype=DTYPES[dtypes.pop()][1] if len(dtypes) == 1 else None,
        tied=draft.tied,
        layers=described(origins) if origins else None,
        doubts=doubts,
    )
    notes = (*(f"config.json: {change}" for change in changes), *left_out_notes)
    config = renumber(config, draft.aligned)
    return draft.noting(notes, config=config, stacked=tuple(stacked), origins=origins)


def check_model(draft: Draft) -> Draft:
    """Hold the output's tensors against what transformers makes of its config.json.

    Raises:
        RecipeError: layers that cannot be stacked.
    """
    if draft.recipe.output is not None:
        return draft
    shapes = {task.name: task.shape for task in draft.tasks}
    index = draft.config_index
    try:
        notes = check_structure(
            draft.config,
            shapes,
            draft.sources[index],
            draft.tensors[index],
            draft.sources,
            draft.origins,
        )
    except ValueError as error:
        message = f"these layers cannot be stacked: {error}."
        raise RecipeError([draft.recipe.problem(draft.stacked[0].key, message)]) from None
    return draft.noting(notes)


def note_leftovers(draft: Draft) -> Draft:
    """Code that is not run, filters that match nothing, layers that gradients do not reach."""
    source, matches = draft.sources[draft.config_index], draft.matches.matches
    names = chain((task.name for task in draft.tasks), sliced_names(matches))
    beyond = dict.fromkeys(
        match.layer_position.group
        for match in matches
        if match.layer_position.beyond and not match.copied
    )
    return draft.noting(
        [
            *named_code(source.root, source.label, files_of(source)),
            *unused_filters(draft.recipe, names),
            *beyond_note(draft.recipe, list(beyond)),
        ]
    )


_PASSES: tuple[Callable[[Draft], Draft], ...] = (
    cut_slices,
    unify_layouts,
    unify_prefixes,
    unify_copies,
    unify_heads,
    align_vocabularies,
    check_copied_files,
    match_tensors,
    compare_settings,
    decide_tasks,
    open_coefficient_file,
    merge_config,
    check_model,
    note_leftovers,
)


def _as_plan(draft: Draft, shard_size: int, stages: Mapping[str, Plan]) -> Plan:
    """What is decided, with the output's tensors laid out in shards."""
    source = draft.sources[draft.config_index]
    tasks = left_out_tasks(draft.recipe, source, draft.config_index, draft.tasks)
    outputs = [output for task in tasks for output in task.outputs]
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
        template=draft.template,
        tasks=tasks,
        shards=tuple(lay_out(outputs, shard_size, source.stems)),
        config=draft.config if source.config else {},
        notes=tuple(dict.fromkeys(draft.notes)),
        coefficients=draft.coefficients,
        shard_size=shard_size,
        stages=stages,
        copies=draft.copies,
    )
    return encodings_described(plan)


def _placed(problem: Problem, recipe: Recipe) -> Problem:
    """With its line, where it is about a key of the recipe and not about a tensor."""
    if problem.key not in recipe.positions:
        return problem
    return recipe.problem(problem.key, problem.message, problem.hint)


def _differences(sources: Sequence[Source]) -> str:
    """What the configs say that would explain it: sizes that differ, model by model."""
    lines = []
    for key in (
        "model_type",
        *LAYER_COUNTS,
        "hidden_size",
        "n_embd",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        values = [text_config(source.config).get(key) for source in sources]
        if len({repr(value) for value in values}) > 1:
            pairs = zip(sources, values, strict=True)
            lines.append(f"{key}: " + ", ".join(f"{s.label} {value}" for s, value in pairs))
    return "".join(f"\n  {line}" for line in lines)
