"""A running average on disk: checkpoints are added without reading the earlier ones again.

    OUT                      the average: a model
    OUT.average/sum-COUNT    the sum of w_i * θ_i of COUNT checkpoints, float32: a model, too

Both are written by soups, so that they stream, resume and say what they are made of. The first
adds: 1 * sum + w * θ, rounded as a soup of all checkpoints rounds at this place. The second divides
the sum once by the sum of all weights, as that soup does. So OUT has the weights of the soup of all
of them, bit for bit, whatever came in which call.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.api import merge, plan
from merge_cli.checkpoint.dtypes import DTYPES, MERGEABLE
from merge_cli.documents import MergeResult
from merge_cli.errors import RecipeError, SourceError, UsageError
from merge_cli.options import MergeOptions, OnProgress
from merge_cli.planning.plan import Plan
from merge_cli.recipe.load import read_recipe
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.values import Parameter, Scalar

_METADATA = "running_average"  # of a sum's recipe: which checkpoints it is of
_PREFIX = "sum-"


@dataclass(frozen=True)
class _Sum:
    """A sum on disk.

    Attributes:
        folder: where it is, or would be.
        checkpoints: those that are in it, in their order, by their real paths.
        weights: one for each.
        dtype: torch's name of the average's.
    """

    folder: Path
    checkpoints: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    dtype: str = ""


def add_checkpoints(
    out: str | os.PathLike[str],
    checkpoints: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    *,
    dtype: str | None = None,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
) -> MergeResult:
    """Add checkpoints to the average at OUT, and write it anew; the first call begins it.

    The same call again, after an interruption or by mistake, adds nothing twice. Earlier
    checkpoints may be deleted: OUT.average holds their sum, and must stay.

    Args:
        out: the folder of the average.
        checkpoints: folders of models, the oldest first.
        weights: one for each; None: 1 each.
        dtype: of the average, as recipes name it; None: that of the first checkpoints.
        options: as for `merge`. An average that this function has made is overwritten.
        on_progress: called with each progress.

    Returns:
        the average, as `merge` returns it.

    Raises:
        UsageError: checkpoints of which some are in the average already, weights that do not fit
            or sum to 0 or less, tensors of several dtypes without `dtype`.
        SourceError: a checkpoint in float64, whose sum float32 cannot hold; and as `merge` does.
    """
    target = Path(os.path.realpath(out))
    options = options or MergeOptions()
    given = tuple(os.path.realpath(checkpoint) for checkpoint in checkpoints)
    factors = (1.0,) * len(given) if weights is None else tuple(map(float, weights))
    _check(given, factors)
    before = _newest(target.with_name(f"{target.name}.average"))
    ours = _is_mean(target, before.folder.parent)
    if target.exists() and not (ours or options.overwrite):
        hint = "Choose another folder, or give overwrite."
        raise UsageError("exists, and is no average of this kind", where=str(target), hint=hint)
    if before.checkpoints[-len(given) :] == given and before.weights[-len(given) :] == factors:
        total = before
    else:
        total = _added(before, given, factors, dtype, options, on_progress)
    result = merge(
        _mean(total, given[-1], dtype or total.dtype),
        target,
        options=replace(options, overwrite=options.overwrite or ours),
        on_progress=on_progress,
    )
    for older in _sums(total.folder.parent):
        if older != total.folder:
            shutil.rmtree(older)
    return result


def _check(given: Sequence[str], weights: Sequence[float]) -> None:
    if not given:
        raise UsageError("there are no checkpoints to add")
    if len(set(given)) < len(given):
        raise UsageError("a checkpoint is listed twice")
    if len(weights) != len(given):
        raise UsageError(f"{len(weights)} weights for {len(given)} checkpoints")
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"weights must be finite numbers (got {list(weights)})")


def _added(
    before: _Sum,
    given: tuple[str, ...],
    weights: tuple[float, ...],
    dtype: str | None,
    options: MergeOptions,
    on_progress: OnProgress | None,
) -> _Sum:
    """The sum with the checkpoints that are given, written beside the one before."""
    repeated = [path for path in given if path in before.checkpoints]
    if repeated:
        hint = "Add only what is new."
        raise UsageError("is in this average already", where=repeated[0], hint=hint)
    every = before.weights + weights
    if math.fsum(every) <= 0:
        raise UsageError(f"the weights sum to {math.fsum(every):g}, and must sum to more than 0")
    old = [(str(before.folder), 1.0)] if before.checkpoints else []
    recipe = _soup([*old, *zip(given, weights, strict=True)], {"normalize": False}, "float32")
    merged_dtype = _dtype(
        plan(_soup([(path, 1.0) for path in given], {}, None)), dtype or before.dtype
    )
    kept = before.dtype or merged_dtype
    checkpoints = before.checkpoints + given
    folder = before.folder.with_name(f"{_PREFIX}{len(checkpoints)}")
    paths = [os.path.relpath(path, folder) for path in checkpoints]
    about = {"checkpoints": paths, "weights": [*every], "dtype": kept}
    recipe = replace(recipe, metadata={_METADATA: about})
    folder.parent.mkdir(exist_ok=True)
    merge(recipe, folder, options=replace(options, overwrite=False), on_progress=on_progress)
    return _Sum(folder, checkpoints, every, kept)


def _mean(total: _Sum, newest: str, dtype: str) -> Recipe:
    """A soup of the sum alone; config and tokenizer are the newest checkpoint's."""
    recipe = _soup([(str(total.folder), 1.0)], {"divisor": math.fsum(total.weights)}, dtype)
    return replace(recipe, base_model=ModelRef(newest))


def _soup(
    models: Sequence[tuple[str, float]], parameters: dict[str, Scalar], dtype: str | None
) -> Recipe:
    specs = tuple(
        SourceSpec(ModelRef(path), f"models[{i}]", {"weight": Parameter("weight", weight, "")})
        for i, (path, weight) in enumerate(models)
    )
    shared = {name: Parameter(name, value, name) for name, value in parameters.items()}
    return Recipe("soup", models=specs, parameters=shared, dtype=dtype)


def _dtype(checkpoints: Plan, asked: str) -> str:
    """The dtype of the average.

    Raises:
        UsageError: tensors of several, and none was asked for.
        SourceError: float64.
    """
    tensors = [
        tensor for source in checkpoints.sources for tensor in source.tensors.values()
        if tensor.default_dtype in MERGEABLE
    ]  # fmt: skip
    wide = next((tensor for tensor in tensors if tensor.default_dtype == "F64"), None)
    if wide is not None:
        message = "is float64, and sums are kept in float32"
        raise SourceError(message, model=wide.model, tensor=wide.name)
    kinds = sorted({DTYPES[tensor.default_dtype][1] for tensor in tensors})
    if not asked and len(kinds) > 1:
        hint = "Give dtype, the dtype of the average."
        raise UsageError(f"the checkpoints have tensors in {' and '.join(kinds)}", hint=hint)
    return asked or kinds[0]


def _sums(folder: Path) -> list[Path]:
    """The sums in OUT.average that are whole, the newest last."""
    recipes = folder.glob(f"{_PREFIX}*/merge_recipe.yaml") if folder.is_dir() else ()
    names = [path.parent for path in recipes if path.parent.name.removeprefix(_PREFIX).isdigit()]
    return sorted(names, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _is_mean(target: Path, sums: Path) -> bool:
    """Whether OUT is a mean that was made of one of these sums."""
    file = target / "merge_recipe.yaml"
    recipe = read_recipe(file)[0] if file.is_file() else None
    if recipe is None or len(recipe.models) != 1:
        return False
    return Path(os.path.realpath(target / recipe.models[0].model.path)).parent == sums


def _newest(folder: Path) -> _Sum:
    """The newest sum; an empty one where there is none.

    Raises:
        UsageError: a folder of that name that holds no sum, or one that does not say of what.
    """
    present = _sums(folder)
    if not present:
        return _Sum(folder / f"{_PREFIX}0")
    try:
        recipe, problems = read_recipe(present[-1] / "merge_recipe.yaml")
    except RecipeError as error:
        raise UsageError("is no running average", where=str(present[-1])) from error
    about: Any = recipe.metadata.get(_METADATA) if recipe is not None and not problems else None
    try:
        checkpoints = tuple(
            os.path.realpath(present[-1] / str(path)) for path in about["checkpoints"]
        )
        weights = tuple(map(float, about["weights"]))
        dtype = str(about["dtype"])
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError("is no running average", where=str(present[-1])) from error
    if len(checkpoints) != len(weights) or f"{_PREFIX}{len(weights)}" != present[-1].name:
        raise UsageError("does not hold the sum that its name promises", where=str(present[-1]))
    return _Sum(present[-1], checkpoints, weights, dtype)
