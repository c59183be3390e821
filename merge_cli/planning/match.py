"""Match tensors across sources by name: which ones make which output tensor, and what does not fit.

Problems are collected, so that one run reports all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from merge_cli.checkpoint.dtypes import MERGEABLE
from merge_cli.checkpoint.tensors import (
    Tensor,
    TensorMap,
    default_dtypes,
    dtypes_in_order,
    has_names,
    in_order,
    shapes_in_order,
)
from merge_cli.errors import Problem
from merge_cli.planning.absent import BUFFER, BUFFERS, AbsentTensors
from merge_cli.planning.equal_tensors import integers_of, unlike_dtypes
from merge_cli.planning.layers import (
    LayerKey,
    LayerPosition,
    LayerPositions,
    heights,
    known_modules,
    layers_of,
    model_heights,
)
from merge_cli.planning.matches import AlikeMatches, Model, TensorMatch, TensorMatches
from merge_cli.planning.output_slices import OutputSlice, SliceOperand
from merge_cli.recipe.fields import nearest
from merge_cli.sources.source import Source

# transformers itself calls this one of GPT-2's unexpected.
_LEFT_OUT = (".attn.masked_bias",)
_MERGEABLE = frozenset(MERGEABLE)
_VOCABULARY = ("embed", "wte", "lm_head", "shared.weight")


def match_pieces(
    slices: Sequence[OutputSlice], sources: Sequence[Source], views: Sequence[TensorMap]
) -> TensorMatches:
    """Find every tensor of every slice in its sources, and what does not fit.

    Args:
        views: for each source, the tensors that it is taken to have.
    """
    matches, absent = TensorMatches(), AbsentTensors(sources)
    layer_keys = matches.layer_keys
    models = [Model(source, view, layer_keys) for source, view in zip(sources, views, strict=True)]
    modules = list(
        dict.fromkeys(output_slice.module for output_slice in slices if output_slice.module)
    )
    parts = [model.parts(modules) if modules else {} for model in models]
    matches.problems += _module_problems(slices, models, parts)
    for output_slice in slices:
        if output_slice.left_over:
            left_over = _left_over(output_slice, parts[output_slice.reference.source][""])
            matches.by_slice.append((output_slice, [*left_over]))
            continue
        of_module = [part[output_slice.module] for part in parts] if output_slice.module else models
        _match_slice(output_slice, of_module, absent, matches)
    return matches


def _module_problems(
    slices: Sequence[OutputSlice], models: Sequence[Model], parts: Sequence[Mapping[str, Model]]
) -> list[Problem]:
    """Modules that a source has not, and tensors that two modules have."""
    problems = {}
    for output_slice in slices:
        for member in output_slice.members if output_slice.module else ():
            module, model = output_slice.module or "", models[member.source]
            tensors = parts[member.source][module].view
            if not tensors:
                key = output_slice.key.partition(f".{module}.")[0] + f".{module}"
                message = f"{model.label} has no tensors of a module '{module}'."
                hint = nearest(module, known_modules(model.view))
                problems[message] = Problem(message, key, hint=hint)
            for other, part in parts[member.source].items():
                shared = next((name for name in part.view if name in tensors), None)
                if other not in (module, "") and shared is not None:
                    first, second = sorted((module, other))
                    message = f"belongs to '{first}' and to '{second}' of the recipe's modules"
                    problems.setdefault(f"{first} {second}", Problem(message, shared))
    return list(problems.values())


def _left_over(output_slice: OutputSlice, model: Model) -> Iterator[TensorMatch]:
    """Copies of what no listed module has."""
    why = f"in none of the recipe's modules: copied from {model.label}"
    for name, ref in model.view.items():
        key = model.layer_keys[name]
        group = f"{key.stack}.{key.number}".lstrip(".") if key else name
        yield TensorMatch(
            name,
            output_slice,
            LayerPosition(group),
            (ref,),
            None,
            output_slice.reference.source,
            why,
        )


def _match_slice(
    output_slice: OutputSlice,
    models: Sequence[Model],
    absent: AbsentTensors,
    into: TensorMatches,
) -> None:
    candidates: list[TensorMap] = []
    for operand in output_slice.members:
        tensors = _offered(output_slice, operand, models[operand.source], into)
        if tensors is None:
            return
        candidates.append(tensors)
    labels = [models[member.source].label for member in output_slice.members]
    sliced = output_slice.reference.layers is not None
    stack = models[output_slice.reference.source].layer_index.main if sliced else None
    names = list(candidates[0])
    layers = layers_of(names)
    layer_counts = heights(layers)
    if not sliced:
        config = models[output_slice.reference.source].source.config
        layer_counts = model_heights(layer_counts, config)
    layer_positions = LayerPositions(layer_counts, stack, output_slice.start).of(names, layers)
    alike = _match_alike(output_slice, names, layer_positions, candidates)
    matches: list[TensorMatch] = []
    for name, position in zip(names, layer_positions, strict=True) if not alike else ():
        if name.endswith(_LEFT_OUT):
            into.note("left out", BUFFER, name)
            continue
        refs = [tensors.get(name) for tensors in candidates]
        if None in refs and not _is_copied(output_slice, name, refs, labels, absent, into):
            continue
        match = _match_tensor(output_slice, name, position, refs, labels, into)
        if match is not None:
            matches.append(match)
    into.by_slice.append((output_slice, alike or matches))
    _report_extra(output_slice, labels, candidates, absent, into)


def _offered(
    output_slice: OutputSlice, operand: SliceOperand, model: Model, into: TensorMatches
) -> TensorMap | None:
    """What a source gives to a slice, by output name; None (and a problem) if it cannot."""
    if operand.layers is None:
        return model.view
    layer_index = model.layer_index
    if layer_index.main is None:
        stacks = sorted(layer_index.stacks)
        several = ", ".join(stacks) or "it has none"
        message = f"{model.label}: cannot tell which stack `layer_range` counts in ({several})"
        hint = "Name its parts: a section `modules:` has slices for each." if stacks else ""
        into.problems.append(Problem(message, output_slice.key, hint=hint))
        return None
    low, high = operand.layers
    layer_count = layer_index.layers
    if high > layer_count:
        message = f"{model.label} has {layer_count} layers, not {high}"
        if high <= layer_index.stacks.get(layer_index.main, 0):
            message += ": what is behind them predicts further tokens"
        into.problems.append(Problem(message, f"{operand.spec.key}.layer_range"))
        return None
    cut = layer_index.cut(range(low, high), first=output_slice.first, last=output_slice.last)
    shift = output_slice.start - low
    return {_shifted(name, key, shift): model.view[name] for name, key in cut}


def _shifted(name: str, key: LayerKey | None, shift: int) -> str:
    """A tensor's name some layers further."""
    shifted = key.name(key.number + shift) if key else name
    # Every source comes to the same new names: one string serves them all.
    return name if shifted == name else sys.intern(shifted)


def _match_alike(
    output_slice: OutputSlice,
    names: Sequence[str],
    positions: Sequence[LayerPosition],
    candidates: Sequence[TensorMap],
) -> AlikeMatches | None:
    """All tensors at once where every source has all of them in one shape; else None.

    As a rule sources are alike. Whole columns are compared in a fraction of the time that
    `_match_tensor` takes for a tensor, and a mixture of experts has 100,000.
    """
    if not names or not all(has_names(tensors, names) for tensors in candidates):
        return None
    text = "\n".join([*names, ""])
    if any(f"{end}\n" in text for end in _LEFT_OUT):
        return None
    shapes, *others = (shapes_in_order(tensors, names) for tensors in candidates)
    dtypes = {dtype for tensors in candidates for dtype in {*dtypes_in_order(tensors, names)}}
    if not dtypes <= _MERGEABLE or any(other != shapes for other in others):
        return None
    columns = [in_order(tensors, names) for tensors in candidates]
    outputs = [default_dtypes(tensors, names) for tensors in candidates]
    base = columns.pop(0) if output_slice.base else None
    source = output_slice.operands[0].source
    return AlikeMatches(output_slice, names, positions, shapes, columns, base, outputs, source)


def _match_tensor(
    output_slice: OutputSlice,
    name: str,
    position: LayerPosition,
    refs: Sequence[Tensor | None],
    labels: Sequence[str],
    into: TensorMatches,
) -> TensorMatch | None:
    """One output tensor; None, and a problem, where there is none.

    Args:
        refs, labels: of the slice's members, in their order.
    """
    present = [ref for ref in refs if ref is not None]
    shape, why = present[0].shape, ""
    if len(present) < len(refs):
        why = f"not every source has it: copied from {labels[0]}"
    elif any([ref.shape != shape for ref in present]):
        into.problems.append(_shapes_differ(name, present, labels))
        return None
    elif any([ref.dtype not in _MERGEABLE for ref in present]):
        for label, ref in zip(labels, present, strict=True):
            if ref.dtype.startswith("F8"):
                message = f"{label} stores it in {ref.dtype}, whose scales cannot be merged yet"
                into.problems.append(Problem(message, name, hint="Convert the model to bfloat16."))
                return None
        is_buffer = name.endswith(BUFFERS)  # whatever it is stored as, models compute it
        if not is_buffer and (unlike := unlike_dtypes(name, present, labels)):
            into.problems.append(unlike)
            return None
        dtype = next(ref.dtype for ref in present if ref.dtype not in _MERGEABLE)
        why = f"{dtype} is not merged: copied"
        into.integers += [] if is_buffer else integers_of(present)
    if why:
        reference = (
            output_slice.reference.source
        )  # has it: its names are the ones that are looked for
        return TensorMatch(name, output_slice, position, (present[0],), None, reference, why)
    base = present.pop(0) if output_slice.base else None
    source = output_slice.operands[0].source
    return TensorMatch(name, output_slice, position, tuple(present), base, source)


def _is_copied(
    output_slice: OutputSlice,
    name: str,
    refs: Sequence[Tensor | None],
    labels: Sequence[str],
    absent: AbsentTensors,
    into: TensorMatches,
) -> bool:
    """Whether a tensor that some sources lack is the reference's; a problem for each if not."""
    lacking = {
        member.source: label
        for member, label, ref in zip(output_slice.members, labels, refs, strict=True)
        if ref is None
    }
    sliced = output_slice.reference.layers is not None
    why = absent.why_copied(name, output_slice.reference.source, lacking, sliced=sliced)
    if why:
        who = ", ".join(lacking.values())
        verb = "lacks" if len(lacking) == 1 else "lack"
        into.note(f"copied from {labels[0]}, as {who} {verb} it", why, name)
        return True
    for label in lacking.values():
        into.problems.append(Problem(f"missing from {label}; {labels[0]} has it", name))
    return False


def _shapes_differ(name: str, refs: Sequence[Tensor], labels: Sequence[str]) -> Problem:
    sizes = [f"{a} {list(ref.shape)}" for a, ref in zip(labels, refs, strict=True)]
    shown = ", ".join(dict.fromkeys(sizes))
    if _is_vocabulary(name, refs):
        message = f"the vocabularies differ in size: {shown}."
        return Problem(message, name, hint=_VOCABULARY_HINT.format(model=labels[-1]))
    return Problem(f"the shapes differ: {shown}", name)


_VOCABULARY_HINT = (
    "Rows would mean different tokens. Say whose vocabulary the output has: "
    "`tokenizer_source: union` (all tokens), `tokenizer_source: base`, or "
    "`tokenizer_source: {model}` (that model's)."
)


def _is_vocabulary(name: str, refs: Sequence[Tensor]) -> bool:
    same_width = len({ref.shape[1:] for ref in refs}) == 1
    return same_width and any(part in name for part in _VOCABULARY)


def _report_extra(
    output_slice: OutputSlice,
    labels: Sequence[str],
    candidates: Sequence[TensorMap],
    absent: AbsentTensors,
    into: TensorMatches,
) -> None:
    """Tensors that some source has and the reference lacks: none is dropped without a word."""
    reference, sliced = candidates[0], output_slice.reference.layers is not None
    seen: set[tuple[str, str]] = set()
    for member, label, tensors in zip(output_slice.members, labels, candidates, strict=True):
        if len(tensors) == len(reference) and has_names(reference, tensors):
            continue
        for name in tensors:
            if name in reference or (label, name) in seen:
                continue
            seen.add((label, name))
            both = output_slice.reference.source, member.source
            why = absent.why_left_out(name, *both, sliced=sliced)
            if why:
                into.note(f"{label} has it, {labels[0]} does not: left out", why, name)
            else:
                into.problems.append(Problem(f"{label} has it, {labels[0]} does not", name))
