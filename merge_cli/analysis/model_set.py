"""The models of an analysis: opened, and their tensors matched and sorted by kind of module.

A merge refuses models that do not fit one another. An analysis compares the tensors that fit, and
keeps the others as reasons why a merge would refuse. The kind of a module follows from the tensor's
name, in any architecture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from merge_cli.checkpoint.layout import natural_key
from merge_cli.errors import MergeCliError, MismatchError, Problem, SourceError, UsageError
from merge_cli.methods.registry import get_method
from merge_cli.planning.heads import reconcile_heads
from merge_cli.planning.match import match_pieces
from merge_cli.planning.matches import TensorMatch
from merge_cli.planning.output_slices import output_slices
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.recipe.reference import ModelRef, parse_reference, short_labels
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source
from merge_cli.tokenizer.aligned import AlignedVocabulary


@dataclass(frozen=True)
class ModelSet:
    """Opened models with matched tensors.

    Attributes:
        plan: its tasks read a tensor of every model, first of the reference: the base, or without
            one the first model. The tasks have no base, and no output.
        base: the base's name; None without one.
        models: names of the sources, shortened where they stay different.
        problems: why a merge of these models would be refused; empty where it would run.
        tensors: number of the base's (or first model's), compared or not.
    """

    plan: Plan
    base: str | None
    models: tuple[str, ...]
    problems: tuple[Problem, ...]
    tensors: int

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every model, the reference first."""
        return self.plan.sources


def recipe_of(base: str | None, models: Sequence[str], *, seed: int = 0) -> Recipe:
    """A recipe of complete models, as a command line names them."""
    folder = Path.cwd()
    specs = [SourceSpec(parse_reference(m, folder), f"models[{i}]") for i, m in enumerate(models)]
    reference = parse_reference(base, folder) if base else None
    method = "task_arithmetic" if base else "soup"
    return Recipe(method, reference, tuple(specs), seed=seed, folder=folder)


def open_model_set(recipe: Recipe) -> ModelSet:
    """Open every model that a recipe names and match their tensors, from headers alone.

    Layers, weights and the method of the recipe are ignored.

    Raises:
        SourceError: a model that cannot be opened.
        MismatchError: several models that cannot be opened.
        UsageError: fewer than two models to compare.
    """
    references = dict.fromkeys(spec.model for spec in recipe.source_specs)
    if recipe.base_model is not None:
        references = {recipe.base_model: None, **references}
    opened, notes = _open_all(list(references), recipe.folder)
    if len(opened) < 2:
        message = "there is nothing to compare: one model"
        raise UsageError(message, hint="Name a base and a model, or two models.")
    has_base = recipe.base_model is not None
    models = list(opened)
    whole_models = Recipe(
        "task_arithmetic" if has_base else "soup",
        models[0] if has_base else None,
        tuple(SourceSpec(m, f"models[{i}]") for i, m in enumerate(models[has_base:])),
        dtype=recipe.dtype,
        seed=recipe.seed,
        name=recipe.name,
        folder=recipe.folder,
    )
    sources = list(opened.values())
    labels = [source.label for source in sources]
    names = short_labels(labels)
    heads = reconcile_heads(sources)
    method = get_method(whole_models.merge_method)
    matches = match_pieces(output_slices(whole_models, method, labels), sources, heads.views)
    problems = [*_quantised(sources), *matches.problems]
    comparable = not _quantised(sources)
    tasks = [_task(match) for match in matches.matches if comparable and not match.copied]
    plan = Plan(
        recipe=whole_models,
        method=method,
        sources=tuple(sources),
        base=0 if has_base else None,
        operands=tuple(range(int(has_base), len(sources))),
        config_index=0,
        aligned=AlignedVocabulary(heads.views, 0),
        tasks=tuple(sorted(tasks, key=lambda task: natural_key(task.name))),
        shards=(),
        config={},
        notes=(*notes, *heads.notes, *matches.notes),
    )
    return ModelSet(
        plan=plan,
        base=names[0] if has_base else None,
        models=tuple(names[has_base:]),
        problems=tuple(sorted(problems, key=lambda problem: natural_key(problem.key))),
        tensors=len(heads.views[0]),
    )


def _open_all(
    references: Sequence[ModelRef], folder: Path
) -> tuple[dict[ModelRef, Source], list[str]]:
    """Open every model once, with a note on each that is named twice."""
    opened: dict[ModelRef, Source] = {}
    first: dict[tuple[Path, ...], Source] = {}
    notes: list[str] = []
    errors: list[MergeCliError] = []
    for reference in references:
        try:
            source = open_source(reference, folder)
        except SourceError as error:
            errors.append(error)
            continue
        opened_first = first.setdefault(source.identity, source)
        if opened_first is source:
            opened[reference] = source
        else:
            notes.append(f"{source.label} is the same model as {opened_first.label}: compared once")
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [Problem(str(error)) for error in errors]
        raise MismatchError(problems, f"{len(errors)} models cannot be opened")
    return opened, notes


def _quantised(sources: Sequence[Source]) -> list[Problem]:
    return [
        Problem("its weights are quantised, so that they cannot be compared", source.label)
        for source in sources
        if source.config.get("quantization_config")
    ]


def _task(match: TensorMatch) -> TensorTask:
    """A task with every model's tensor as an operand: `measure` subtracts the first."""
    refs = (match.base, *match.operands) if match.base is not None else match.operands
    first = refs[0]
    return TensorTask(
        match.name,
        first.shape,
        first.dtype,
        "merge",
        refs,
        tuple(range(len(refs))),
        (),
        group=match.layer_position.group,
    )


KINDS = (
    "embedding",
    "attention q",
    "attention k",
    "attention v",
    "attention qkv",
    "attention o",
    "mlp",
    "router",
    "norm",
    "head",
    "other",
)

_ATTENTION = r"(?:^|\.)\w*att(?:n|ention)\w*\."  # what follows is inside it
_START = r"(?:^|\.)"
# The first rule that matches the name without its `.weight` decides, so that
# `attention.output.LayerNorm` is a norm and `mlp.gate` a router.
_RULES = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        (
            "head",
            rf"{_START}(?:lm_head|embed_out|output|score|classifier|cls|qa_outputs)"
            r"(?:\.\D+)?$",
        ),
        ("norm", r"(?:norm|(?:^|[._])ln)[^.]*$"),
        ("router", r"(?:(?:moe|mlp|feed_forward)\.gate|router[^.]*(?:\.[^.]+)?)$"),
        ("embedding", rf"(?:embed|{_START}w[tp]e$|{_START}shared$|relative_attention_bias)"),
        (
            "attention qkv",
            r"(?:c_attn|query_key_value|wqkv|"
            rf"{_ATTENTION}(?:qkv|kv_|in_proj)[^.]*)$",
        ),
        ("attention q", rf"(?:q_proj|{_START}query|{_START}wq|q_[ab]_proj|q_lin|{_ATTENTION}q)$"),
        ("attention k", rf"(?:k_proj|{_START}key|{_START}wk|k_lin|{_ATTENTION}k)$"),
        ("attention v", rf"(?:v_proj|{_START}value|{_START}wv|v_lin|{_ATTENTION}v)$"),
        (
            "attention o",
            r"(?:o_proj|(?:^|\.)wo|out_lin|"
            + _ATTENTION
            + r"(?:out_proj|(?:output\.)?dense|c_proj|proj|to_out.*|o))$",
        ),
        (
            "mlp",
            r"(?:mlp|ffn|feed_?forward|experts?|DenseReluDense|fc_?\d|(?:up|down|gate)_proj|"
            r"c_fc|(?:intermediate|output)\.dense$|(?:^|\.)w[123]$|lin[12]$)",
        ),
    )
)

_NUMBER = re.compile(r"\.\d+(?=\.)")


def kind_of(name: str) -> str:
    """One of `KINDS`."""
    return _kind_of(_NUMBER.sub(".0", name))  # layers and experts share their modules


@lru_cache(maxsize=65_536)
def _kind_of(name: str) -> str:
    module = re.sub(r"\.(?:weight|bias)$|(?<=norm)_(?:weight|bias)$", "", name)
    in_layer = re.search(r"(?:^|\.)\d+\.", name) is not None
    for kind, pattern in _RULES:
        if pattern.search(module) and not (kind == "head" and in_layer):
            return kind
    return "other"
