"""From a recipe to a plan: open the sources, match their tensors, decide every output tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_cli.checkpoint.config import merged_config, with_layer_types
from merge_cli.checkpoint.header import DTYPES
from merge_cli.checkpoint.layout import lay_out, natural_key
from merge_cli.checkpoint.source import Source, open_source
from merge_cli.engine.heads import reconcile_heads
from merge_cli.engine.match import Match, Matches, Piece, is_mergeable, match_piece
from merge_cli.engine.plan import Plan, TensorTask
from merge_cli.errors import (
    MergeCliError,
    MismatchError,
    Problem,
    RecipeError,
    SourceError,
)
from merge_cli.methods.registry import Method
from merge_cli.methods.resolve import check_recipe, combination_error, operand_specs, resolve
from merge_cli.recipe.load import parse_text, read_recipe
from merge_cli.recipe.reference import ModelRef, local_folder
from merge_cli.recipe.schema import Recipe, SliceSpec, SourceSpec

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
    checked = check_recipe(recipe)
    problems = sorted({*problems, *checked.problems}, key=lambda p: (p.line, p.column, p.key))
    if problems:
        raise RecipeError(problems)
    return replace(recipe, warnings=recipe.warnings + checked.warnings)


def make_plan(recipe: Recipe, *, shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Decide every output tensor from headers.

    Raises:
        SourceError: a model that cannot be opened.
        MismatchError: sources that do not fit one another, every problem at once.
        RecipeError: values that no tensor can be merged with.
    """
    method = check_recipe(recipe).method
    assert method is not None, "load_recipe refuses a recipe without a method"
    references = _references(recipe)
    sources = _open_all(references, recipe.folder)
    index = {reference: i for i, reference in enumerate(references)}
    base = index.get(recipe.base_model) if recipe.base_model else None
    heads = reconcile_heads(sources)
    parts = _parts(recipe, method, index)
    pieces = [part.piece for part in parts]
    matches = Matches(notes=[*heads.notes])
    for part in parts:
        match_piece(part.piece, sources, heads.views, matches)
    if matches.problems:
        count = len(matches.problems)
        summary = f"the sources do not fit one another ({count} problem{'s' * (count != 1)})"
        ordered = sorted(matches.problems, key=lambda problem: natural_key(problem.key))
        raise MismatchError(ordered, summary)
    tasks: list[TensorTask] = []
    refused: dict[str, Problem] = {}
    part_of = {part.piece.key: part for part in parts}
    for match in matches.found:
        task, wrong = _task(recipe, method, part_of[match.piece], match)
        tasks.append(task)
        if wrong:
            refused.setdefault(wrong, recipe.problem(match.piece, wrong))
    if refused:
        raise RecipeError(list(refused.values()))
    tasks.sort(key=lambda task: natural_key(task.name))
    donor = base if base is not None else pieces[0].reference
    dtypes = {task.dtype for task in tasks if task.dtype in _FLOATS}
    donated = sources[donor].config
    if recipe.slices:
        donated = with_layer_types(donated, sources[donor].root)
    try:
        config, changes = merged_config(
            donated,
            dtype=DTYPES[dtypes.pop()][1] if len(dtypes) == 1 else None,
            tied=heads.tied,
            layers=_layer_sources(pieces, sources) if recipe.slices else None,
        )
    except ValueError as error:
        what = f"these layers cannot be stacked: {error}."
        raise RecipeError([recipe.problem("slices", what)]) from None
    notes = [
        *(f"{source.label}: {note}" for source in sources for note in source.notes),
        *matches.notes,
        *(f"config.json: {change}" for change in changes),
    ]
    if recipe.base_model is None:
        notes.insert(0, f"config.json and tokenizer come from {sources[donor].label}, listed first")
    operands = tuple(dict.fromkeys(i for piece in pieces for i in piece.operands))
    return Plan(
        recipe=recipe,
        method=method,
        sources=tuple(sources),
        base=base,
        operands=operands,
        donor=donor,
        tokenizer_donor=_tokenizer_donor(recipe, index, donor, base),
        tasks=tuple(tasks),
        shards=tuple(lay_out([task.output for task in tasks], shard_size)),
        config=config if sources[donor].config else {},
        notes=tuple(dict.fromkeys(notes)),
    )


_FLOATS = ("F64", "F32", "BF16", "F16")


def _references(recipe: Recipe) -> list[ModelRef]:
    """Every model that the merge looks at, once; the base first."""
    found = dict.fromkeys(spec.model for spec in recipe.source_specs)
    if recipe.base_model is not None:
        found = {recipe.base_model: None, **found}
    return list(found)


def _open_all(references: Sequence[ModelRef], folder: Path) -> list[Source]:
    sources: list[Source] = []
    errors: list[MergeCliError] = []
    for reference in references:
        try:
            sources.append(open_source(reference, folder))
        except SourceError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [Problem(str(error)) for error in errors]
        raise MismatchError(problems, f"{len(errors)} models cannot be opened")
    for source in sources:
        quantised = source.config.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
            what = f"its weights are quantised ({method or 'quantization_config in config.json'})"
            hint = "Merge the unquantised models, then quantise the result."
            raise SourceError(what, model=source.label, hint=hint)
    return sources


@dataclass(frozen=True)
class _Part:
    """A piece with what the recipe says about it."""

    piece: Piece
    spec: SliceSpec | None
    operands: tuple[SourceSpec, ...]


def _parts(recipe: Recipe, method: Method, index: dict[ModelRef, int]) -> list[_Part]:
    base = index[recipe.base_model] if method.needs_base and recipe.base_model else None
    if recipe.models:
        specs = operand_specs(recipe, method, recipe.models)
        operands = tuple(index[spec.model] for spec in specs)
        reference = base if base is not None else operands[0]
        return [_Part(Piece("models", operands, base, reference), None, specs)]
    parts: list[_Part] = []
    start = 0
    for number, spec in enumerate(recipe.slices):
        specs = operand_specs(recipe, method, spec.sources)
        operands = tuple(index[s.model] for s in specs)
        own = {index[s.model]: s.layer_range for s in spec.sources if s.layer_range}
        span = next(iter(own.values()))
        # A base that the slice does not list lends the same layers.
        ranges = {i: own.get(i, span) for i in (base, *operands) if i is not None}
        piece = Piece(
            spec.key,
            operands,
            base,
            reference=base if base is not None else operands[0],
            ranges=ranges,
            first=number == 0,
            last=number == len(recipe.slices) - 1,
            start=start,
        )
        parts.append(_Part(piece, spec, specs))
        start += span[1] - span[0]
    return parts


def _task(
    recipe: Recipe,
    method: Method,
    part: _Part,
    match: Match,
) -> tuple[TensorTask, str]:
    """One output tensor, and why it cannot be (empty when it can)."""
    piece, specs = part.piece, part.operands
    order = {spec.key: i for i, spec in enumerate(recipe.source_specs)}
    ids = tuple(order.get(spec.key, -1) for spec in specs)
    like = match.base or match.operands[0]
    dtype = like.dtype
    if not is_mergeable(match) or len(match.operands) < len(specs):
        note = "" if len(match.operands) < len(specs) else f"{dtype} is not merged: copied"
        task = TensorTask(match.name, like.shape, dtype, "copy", (like,), (piece.reference,),
                          ids[:1], group=match.group, note=note)  # fmt: skip
        return task, ""
    parameters = resolve(recipe, method, part.spec, specs, match.name, match.position)
    if recipe.output_dtype:
        dtype = _TORCH_TO_SAFETENSORS[recipe.output_dtype]
    mixed = {ref.dtype for ref in (*match.operands, like)}
    note = f"stored as {', '.join(sorted(mixed))}" if len(mixed) > 1 else ""
    copies = method.copies is not None and method.copies(**parameters)
    unchanged = copies and match.operands[0].dtype == dtype
    task = TensorTask(
        match.name, like.shape, dtype, "copy" if unchanged else "merge",
        match.operands, piece.operands, ids, match.base, parameters, match.group, note,
    )  # fmt: skip
    return task, combination_error(method, parameters)


def _layer_sources(
    pieces: Sequence[Piece], sources: Sequence[Source]
) -> list[tuple[dict[str, object], int]]:
    """For each output layer, whose config describes it and which layer it is there."""
    found: list[tuple[dict[str, object], int]] = []
    for piece in pieces:
        assert piece.ranges is not None
        low, high = piece.ranges[piece.reference]
        source = sources[piece.reference]
        config = with_layer_types(source.config, source.root)
        found.extend((config, layer) for layer in range(low, high))
    return found


def _tokenizer_donor(
    recipe: Recipe, index: dict[ModelRef, int], donor: int, base: int | None
) -> int:
    wanted = recipe.tokenizer_source
    if wanted is None:
        return donor
    if wanted == "base":
        if base is None:
            what = "there is no base_model to take the tokenizer from."
            raise RecipeError([recipe.problem("tokenizer_source", what)])
        return base
    place = local_folder(wanted, recipe.folder)
    for reference, i in index.items():
        same = local_folder(reference.path, recipe.folder)
        if str(reference) == wanted or (place is not None and same == place):
            return i
    what = f"'{wanted}' is none of the recipe's models."
    raise RecipeError([recipe.problem("tokenizer_source", what, "Use `base` or one of them.")])
