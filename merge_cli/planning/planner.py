"""From a recipe to a plan: open the sources, match their tensors, decide every output tensor.

The models of a recipe, each opened once, whatever it is called.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path

from merge_cli.checkpoint.auxiliary_files import check_links, named_code, read_card
from merge_cli.checkpoint.coefficients import CoefficientFile, open_coefficients
from merge_cli.checkpoint.config import (
    merged_config,
    text_config,
    with_layer_types,
)
from merge_cli.checkpoint.headers import DTYPES
from merge_cli.checkpoint.layer_config import LAYER_COUNTS
from merge_cli.checkpoint.layout import lay_out, natural_key
from merge_cli.errors import (
    MergeCliError,
    MismatchError,
    Problem,
    RecipeError,
    SourceError,
    UsageError,
)
from merge_cli.formats.detect import advice
from merge_cli.methods.registry import Method
from merge_cli.planning import fp8_output as fp8
from merge_cli.planning.aliases import join_aliases
from merge_cli.planning.config_notes import config_notes
from merge_cli.planning.heads import head_problems, reconcile_heads
from merge_cli.planning.layouts import lay_out_alike
from merge_cli.planning.match import TensorMatch, match_pieces
from merge_cli.planning.output_slices import (
    OutputSlice,
    described,
    left_out,
    origins_of,
    output_slices,
    stacked_slices,
)
from merge_cli.planning.plan import (
    Action,
    Plan,
    TensorTask,
    input_names,
    is_stored_as,
    promoted_dtype,
    promotion_note,
    sliced_names,
)
from merge_cli.planning.prefixes import RenamedModel, rename
from merge_cli.planning.resolve import Resolver, beyond_note, check_recipe, unused_filters
from merge_cli.planning.structure import check_structure
from merge_cli.recipe.load import parse_text, read_recipe
from merge_cli.recipe.reference import ModelRef, local_file, local_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source, open_source
from merge_cli.tokenizer.alignment import align
from merge_cli.tokenizer.chat_template import choose_template
from merge_cli.tokenizer.files import check_companions
from merge_cli.tokenizer.renumbering import renumber, vocabulary_notes

DEFAULT_SHARD_SIZE = 5_000_000_000  # transformers' default
_TORCH_TO_SAFETENSORS = {torch_name: name for name, (_, torch_name) in DTYPES.items()}


def load_recipe(path: str | Path, *, text: str | None = None) -> Recipe:
    """Read a recipe and check everything that can be checked without looking at a model.

    Args:
        path: the recipe's file; `-` reads standard input.
        text: the recipe itself, instead of the file's content.

    Raises:
        RecipeError: every problem, with file, line, column, key, and the nearest known word.
    """
    recipe, problems = (
        read_recipe(path) if text is None else parse_text(text, str(path), Path(path).parent)
    )
    if recipe is None:
        raise RecipeError(problems)
    stages = []
    for document in (*recipe.stages, recipe):
        document = one_spelling(document)
        checked = check_recipe(document)
        problems = [*problems, *checked.problems]
        warnings = document.warnings + checked.warnings
        stages.append(replace(document, warnings=warnings))
    if problems:
        raise RecipeError(sorted(set(problems), key=lambda p: (p.line, p.column, p.key)))
    *stages, final = stages
    warnings = tuple(line for document in (*stages, final) for line in document.warnings)
    return replace(final, stages=tuple(stages), warnings=warnings)


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
    method = check_recipe(recipe).method
    assert method is not None, "load_recipe refuses a recipe without a method"
    if recipe.stages and stages is None:
        message = "this recipe has several documents: only `run` and `plan` read them"
        raise UsageError(message, where=recipe.file, hint="Run it, then name its result.")
    recipe, sources = open_all(recipe, made or {})
    problems = check_recipe(recipe).problems  # again: two names may turn out to be one model
    if problems:
        raise RecipeError(problems)
    labels = [source.label for source in sources]
    base = labels.index(str(recipe.base_model)) if recipe.base_model else None
    pieces = output_slices(recipe, method, labels)
    laid_out = lay_out_alike(sources, pieces[0].reference.source)
    sources = list(laid_out.sources)
    renamed = RenamedModel(tuple(sources))
    if recipe.models:
        renamed = rename(sources, pieces[0].reference.source)
        sources = list(renamed.sources)
    aliases = join_aliases(sources, pieces[0].reference.source)
    sources = list(aliases.sources)
    mixed = head_problems(sources)
    if mixed:
        raise MismatchError(mixed, "the models have different heads")
    heads = reconcile_heads(sources)
    donor = base if base is not None else pieces[0].reference.source
    aligned = align(recipe, sources, heads.views, base, donor)
    givers = sources[donor], aligned.guest or sources[aligned.donor]
    check_links(givers[0].root, givers[1].root, (givers[0].label, givers[1].label))
    check_companions(*givers)
    matches = match_pieces(pieces, sources, aligned.views)
    if matches.problems:
        count = len(matches.problems)
        summary = f"the sources do not fit one another ({count} problem{'s' * (count != 1)})"
        summary += _differences(sources)
        placed = (_placed(problem, recipe) for problem in matches.problems)
        ordered = sorted(placed, key=lambda problem: natural_key(problem.key))
        raise MismatchError(ordered, summary)
    tasks: list[TensorTask] = []
    refused: dict[str, Problem] = {}
    codes = fp8.Fp8(sources[donor]) if recipe.fp8 else None
    for piece, found in groupby(matches.found, key=attrgetter("piece")):
        for task, wrong in _tasks(recipe, method, piece, found, codes, aliases.of):
            tasks.append(task)
            if wrong:
                refused.setdefault(wrong, recipe.problem(piece.key, wrong))
    unfit = fp8.refused(recipe, sources[donor].config) or fp8.nothing(recipe, tasks)
    if refused or unfit:
        raise RecipeError([*refused.values(), *filter(None, [unfit])])
    tasks.sort(key=lambda task: natural_key(task.name))
    coefficients = _coefficients(recipe, tasks)
    dtypes = {task.dtype for task in tasks if task.dtype in _FLOATS}
    donated = sources[donor].config
    stacked = stacked_slices(recipe, pieces, sources)
    behind: list[str] = []
    if stacked:
        donated = with_layer_types(donated, sources[donor].root)
        donated, behind = left_out(donated, stacked, sources, matches.places)
    doubts: list[str] = []
    origins = origins_of(stacked, sources, matches.places, doubts) if stacked else None
    config, changes = merged_config(
        donated,
        dtype=DTYPES[dtypes.pop()][1] if len(dtypes) == 1 else None,
        tied=heads.tied,
        layers=described(origins) if origins else None,
        doubts=doubts,
    )
    config = renumber(config, aligned)
    shapes = {task.name: task.shape for task in tasks}
    try:
        opening = (
            check_structure(config, shapes, sources[donor], heads.views[donor], sources, origins)
            if recipe.output is None
            else []
        )
    except ValueError as error:
        message = f"these layers cannot be stacked: {error}."
        raise RecipeError([recipe.problem(stacked[0].key, message)]) from None
    template, template_note = choose_template(recipe, sources)
    notes = [
        *(f"{source.label}: {note}" for source in sources for note in source.notes),
        *(
            f"{source.label}: {why}; its licence and languages are taken as unknown"
            for source in sources
            if (why := read_card(source.root)[1])
        ),
        *laid_out.notes,
        *renamed.notes,
        *aliases.notes,
        *heads.notes,
        *aligned.notes,
        *config_notes(sources, donor),
        *(vocabulary_notes(sources) if recipe.tokenizer is None else ()),
        *template_note,
        *matches.notes,
        *promotion_note(recipe, tasks),
        *(f"config.json: {change}" for change in changes),
        *behind,
        *opening,
        *named_code(givers[0].root, givers[0].label, files_of(givers[0])),
        *unused_filters(recipe, chain((task.name for task in tasks), sliced_names(matches.found))),
        *beyond_note(
            recipe,
            list(
                dict.fromkeys(
                    match.seat.group
                    for match in matches.found
                    if match.seat.beyond and not match.copied
                )
            ),
        ),
    ]
    if recipe.base_model is None:
        notes.insert(0, f"config.json and tokenizer come from {sources[donor].label}, listed first")
    outputs = [output for task in tasks for output in task.outputs]
    operands = dict.fromkeys(o.source for piece in pieces for o in piece.operands)
    return fp8.described(
        Plan(
            recipe=recipe,
            method=method,
            sources=(*sources, *filter(None, [aligned.guest])),
            base=base,
            operands=tuple(operands),
            donor=donor,
            aligned=aligned,
            template=template,
            tasks=tuple(tasks),
            shards=tuple(lay_out(outputs, shard_size, sources[donor].stems)),
            config=config if sources[donor].config else {},
            notes=tuple(dict.fromkeys(notes)),
            coefficients=coefficients,
            shard_size=shard_size,
            stages=stages or {},
            copies=(*aliases.stored, *heads.stored),
        )
    )


_FLOATS = ("F64", "F32", "BF16", "F16")


def _placed(problem: Problem, recipe: Recipe) -> Problem:
    """With its line, where it is about a key of the recipe and not about a tensor."""
    known = problem.key in recipe.places
    return recipe.problem(problem.key, problem.what, problem.hint) if known else problem


def _differences(sources: Sequence[Source]) -> str:
    """What the configs say that would explain it: sizes that differ, model by model."""
    found = []
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
            found.append(f"{key}: " + ", ".join(f"{s.label} {value}" for s, value in pairs))
    return "".join(f"\n  {line}" for line in found)


def _tasks(
    recipe: Recipe,
    method: Method,
    piece: OutputSlice,
    matches: Iterable[TensorMatch],
    codes: fp8.Fp8 | None,
    copies: Mapping[str, str],
) -> Iterator[tuple[TensorTask, str]]:
    """The output tensors of one piece, and why each cannot be (empty when it can)."""
    resolver = Resolver(recipe, method, piece.spec, [operand.spec for operand in piece.operands])
    sources = tuple(operand.source for operand in piece.operands)
    ids = tuple(operand.place for operand in piece.operands)
    requested = _TORCH_TO_SAFETENSORS[recipe.output_dtype] if recipe.output_dtype else None
    for match in matches:
        like = match.base or match.operands[0]
        name, operands, group = match.name, match.operands, match.seat.group
        if match.copied:
            rounded = requested if requested and like.native in _FLOATS else like.native
            yield (
                TensorTask(
                    name,
                    like.shape,
                    rounded,
                    "copy",
                    operands,
                    (match.source,),
                    (),
                    group=group,
                    note=match.copied,
                ),
                "",
            )
            continue
        copy_of = copies.get(name, "")
        own = input_names(match) if resolver.filtered and not copy_of else ()
        resolved = resolver.of(copy_of or name, match.seat.position, own)
        block = codes.block(name, like) if codes else None
        dtype = fp8.CODES if block else requested or promoted_dtype(like, operands)
        copied = resolved.copies and is_stored_as(operands[0], dtype)
        action: Action = "copy" if copied else "merge"
        mixed = {ref.native for ref in operands} | {like.native}
        note = f"stored as {', '.join(sorted(mixed))}" if len(mixed) > 1 else ""
        task = TensorTask(
            name,
            like.shape,
            dtype,
            action,
            operands,
            sources,
            ids,
            match.base,
            resolved.parameters,
            group,
            note,
            match.seat.position,
            block,
            copy_of,
        )
        yield task, resolved.error


def _coefficients(recipe: Recipe, tasks: Sequence[TensorTask]) -> CoefficientFile | None:
    """The recipe's file of coefficients, which must fit every merged tensor."""
    place = local_file(recipe.coefficients, recipe.folder) if recipe.coefficients else None
    if place is None:
        return None
    result = open_coefficients(place)
    problems = [
        Problem(problem, task.name)
        for task in tasks
        if task.action == "merge"
        for problem in result.problems(task.formula_name, task.shape, len(task.operands))
    ]
    if problems:
        raise MismatchError(problems, f"{place.name} does not fit these models")
    return result


def one_spelling(recipe: Recipe) -> Recipe:
    """`base` and `./base` are one model: named as the recipe names it first."""
    first: dict[Path, ModelRef] = {}
    spelling: dict[ModelRef, ModelRef] = {}
    for model in recipe.references:
        place = local_folder(model.path, recipe.folder)
        known = place is not None and not model.lora
        spelling[model] = first.setdefault(place.resolve(), model) if place and known else model
    return recipe.with_models(spelling)


def open_all(recipe: Recipe, made: Mapping[str, Source]) -> tuple[Recipe, list[Source]]:
    """Open every model, the base first.

    Args:
        made: the results of other documents, by name: open already.

    Returns:
        the recipe with one spelling for each model, and the sources, each once.

    Raises:
        SourceError: a model that cannot be opened, or whose weights are quantised.
        MismatchError: several that cannot be opened.
    """
    opened: dict[ModelRef, Source] = {}
    first: dict[tuple[Path, ...], ModelRef] = {}
    spelling: dict[ModelRef, ModelRef] = {}
    errors: list[MergeCliError] = []
    for reference in recipe.references:
        try:
            source = made.get(str(reference)) or open_source(reference, recipe.folder)
        except SourceError as error:
            errors.append(error)
            continue
        # `base` and `./base`, a branch and its commit: one model, whose spelling decides nothing.
        spelling[reference] = first.setdefault(source.place, reference)
        opened.setdefault(spelling[reference], source)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [Problem(str(error)) for error in errors]
        raise MismatchError(problems, f"{len(errors)} models cannot be opened")
    for source in opened.values():
        refused = advice(source.config)
        if refused is not None:
            method, hint = refused
            message = f"its weights are quantised ({method})"
            raise SourceError(message, model=source.label, hint=hint)
    return recipe.with_models(spelling), list(opened.values())


def files_of(source: Source) -> frozenset[str]:
    """The names of a model's files, here or on the Hub."""
    here = {path.name for path in source.root.iterdir()} if source.root.is_dir() else set()
    return frozenset(here | set(source.hub.files if source.hub else ()))
