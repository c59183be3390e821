"""The passes of a plan: each takes a draft and returns a draft. `planner.py` has their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter

from merge_cli.checkpoint.auxiliary_files import check_links, named_code
from merge_cli.checkpoint.coefficients import open_coefficients
from merge_cli.checkpoint.config import merged_config, text_config, with_layer_types
from merge_cli.checkpoint.dtypes import DTYPES, MERGEABLE
from merge_cli.checkpoint.layer_config import LAYER_COUNTS
from merge_cli.checkpoint.layout import natural_key
from merge_cli.errors import MismatchError, Problem, RecipeError
from merge_cli.planning.aliases import join_aliases
from merge_cli.planning.config_notes import config_notes
from merge_cli.planning.draft import Draft
from merge_cli.planning.heads import head_problems, reconcile_heads
from merge_cli.planning.layouts import lay_out_alike
from merge_cli.planning.match import match_pieces
from merge_cli.planning.method_checks import beyond_note, unused_filters
from merge_cli.planning.opening import files_of
from merge_cli.planning.output_slices import (
    described,
    left_out,
    origins_of,
    output_slices,
    stacked_slices,
)
from merge_cli.planning.plan import sliced_names
from merge_cli.planning.prefixes import rename
from merge_cli.planning.structure import check_structure
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source
from merge_cli.tokenizer.alignment import align
from merge_cli.tokenizer.chat_template import choose_templates
from merge_cli.tokenizer.conversion import check_companions
from merge_cli.tokenizer.renumbering import renumber, vocabulary_notes


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
    return replace(draft, copy_of=aliases.of, compared=(*draft.compared, *aliases.stored))


def unify_heads(draft: Draft) -> Draft:
    """Either every source has an output head or none has.

    Raises:
        MismatchError: classifiers among language models.
    """
    problems = head_problems(draft.sources)
    if problems:
        raise MismatchError(problems, "the models have different heads")
    heads = reconcile_heads(draft.sources)
    compared = (*draft.compared, *heads.stored)
    return draft.noting(heads.notes, tensors=heads.views, tied=heads.tied, compared=compared)


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
    return replace(draft, matches=matches, compared=(*draft.compared, *matches.integers))


def compare_settings(draft: Draft) -> Draft:
    """Differences between configs and tokenizers that merging does not reconcile."""
    recipe, sources = draft.recipe, draft.sources
    templates = choose_templates(recipe, sources, draft.tokenizer_source)
    vocabularies = vocabulary_notes(sources) if recipe.tokenizer is None else ()
    operands = [operand for part in draft.slices for operand in part.operands]
    whole = not recipe.modules and all(operand.layers is None for operand in operands)
    differences = config_notes(sources, draft.config_index, counts_layers=whole)
    return draft.noting((*differences, *vocabularies, *templates.notes), templates=templates)


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
    columns = (map(attrgetter(field), draft.tasks) for field in ("name", "shape"))
    shapes = dict(zip(*columns, strict=True))
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
    source, matches = draft.sources[draft.config_index], draft.matches
    sliced = matches.in_layers(lambda position: position.layer is not None)
    beyond = matches.in_layers(attrgetter("beyond"))
    names = chain((task.name for task in draft.tasks), sliced_names(sliced))
    groups = dict.fromkeys(match.layer_position.group for match in beyond if not match.copied)
    return draft.noting(
        [
            *named_code(source.root, source.label, files_of(source)),
            *unused_filters(draft.recipe, names),
            *beyond_note(draft.recipe, list(groups)),
        ]
    )


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
