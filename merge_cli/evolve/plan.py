"""What would be searched, on what, and with how much: known without loading weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from merge_cli.calibration.plan import CalibrationPlan, plan_calibration
from merge_cli.checkpoint.fingerprint import auxiliary_fingerprint
from merge_cli.engine.device import choose_device
from merge_cli.engine.residency import SourceResidency, choose_residency, stored_bytes
from merge_cli.errors import RecipeError, ResourceError
from merge_cli.evaluation.live import load_tokenizer
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.tasks.kl import KL
from merge_cli.evaluation.tasks.loss import LossTask
from merge_cli.evolve.layer_space import LayerSpace
from merge_cli.evolve.objectives import ALL_ROWS, SearchObjective, Split, SplitName, parse_objective
from merge_cli.evolve.optimizer import batch_size
from merge_cli.evolve.space import Space, default_population
from merge_cli.evolve.splits import refuse_overlap
from merge_cli.evolve.starts import first_merges, is_recipe, start_genome
from merge_cli.evolve.static import StaticMerge, fisher_merge, without_data
from merge_cli.options import MergeOptions
from merge_cli.planning.heads import reconcile_heads
from merge_cli.planning.layers import layer_stacks, main_stack, model_heights
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.search import Search


@dataclass(frozen=True)
class SearchPlan:
    """A search, decided.

    Attributes:
        recipe: the one that searches, its models spelled as they were opened.
        space: None for a greedy soup, which has no parameters.
        layers: of the models.
        population: of the first generation.
        residency: where the sources' bytes will wait.
        labels: of the recipe's models.
        statics: merges that need no search, which every search evaluates first.
        warnings: what a user should know before hours are spent.
        on_cpu: whether candidates are evaluated without an accelerator.
        calibration: what Fisher merging looks at first; None where models have no data.
    """

    plan: Plan
    search: Search
    objective: SearchObjective
    space: Space | None
    layers: int
    population: int
    residency: SourceResidency
    labels: tuple[str, ...]
    statics: tuple[StaticMerge, ...]
    warnings: tuple[str, ...]
    on_cpu: bool
    calibration: CalibrationPlan | None = None

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def evaluations(self) -> int:
        """On the split search: of static merges and of candidates."""
        proposed = self.search.evaluations if self.space else 2 * len(self.labels) - 1
        return len(self.statics) + proposed

    def static(self) -> Recipe:
        """A static recipe of all sources, to load the live model with."""
        if self.space is not None and not isinstance(self.space, LayerSpace):
            return self.space.recipe([0.5] * len(self.space))
        return self.recipe.with_result("soup")


def plan_search(plan: Plan, options: MergeOptions) -> SearchPlan:
    """Decide a search from headers and data.

    Raises:
        RecipeError: a wrong objective, groups that the layers cannot be divided into.
        MismatchError: splits that share rows; sources that an inner method cannot merge.
        SourceError: data that cannot be read.
        ResourceError: an engine or an optimizer whose package is missing.
    """
    plan.aligned.refuse_rearranged(plan.recipe, "a search")
    objective = plan_objective(plan.recipe, options)
    fisher, calibration = fisher_merge(plan.recipe), None
    if fisher is not None:
        calibration = plan_calibration(make_plan(fisher.recipe), options.device)
    plan = replace(plan, recipe=without_data(plan.recipe))
    recipe = plan.recipe
    search = recipe.search or Search()
    names = [task.name for task in plan.tasks]
    counts = model_heights(layer_stacks(names), plan.config)
    main = main_stack(names, plan.config)
    layers = counts[main] if main is not None else max(counts.values(), default=1)
    space: Space | None = None
    if search.method:
        space = (LayerSpace if search.layers else Space)(recipe, layers)
    if space is not None and not len(space):
        raise RecipeError([recipe.problem("search.parameters", "there is nothing to search.")])
    if space is None and "validation" in objective.splits:
        message = "greedy_soup chooses by the split `search`; there is nothing left to choose."
        raise RecipeError([recipe.problem("objective", message, "Leave out the split validation.")])
    if space is None:
        _need_one_frame(plan)
    warnings = _missing_splits(objective, greedy=space is None)
    if space is not None:
        _check_space(recipe, search, space, objective)
    load_tokenizer(plan.sources[plan.tokenizer_index])
    population = len(plan.recipe.models)
    if space is not None:
        population = batch_size(search, search.population or default_population(len(space)))
    device = choose_device(options.device, planned=True)
    return SearchPlan(
        plan,
        search,
        objective,
        space,
        layers,
        population,
        choose_residency(
            stored_bytes(plan.stored_inputs),
            device.indexes[0] if device.indexes else None,
            on_device=plan.bytes_written,
            workers=search.workers,
            memory=device.memory,
        ),
        tuple(str(spec.model) for spec in recipe.models),
        first_merges(recipe, search, space, objective, fisher),
        tuple(warnings),
        not device.indexes,
        calibration,
    )


def _check_space(recipe: Recipe, search: Search, space: Space, objective: SearchObjective) -> None:
    """What is wrong with a search is found before anything is loaded.

    Raises:
        RecipeError, MismatchError, UsageError: its goals, its methods, its start.
    """
    if search.optimizer == "nsga2" and len(objective.search.weighted) == 1:
        message = "nsga2 is for several goals, and the split search has one."
        raise RecipeError([recipe.problem("search.optimizer", message, "Use cma-es or tpe.")])
    if isinstance(space, LayerSpace):  # each model before and after each other
        for values in ([1.0] * len(space), [0.0] * len(space)):
            make_plan(space.recipe(values))
    else:
        for method in space.search.method:
            make_plan(recipe.with_result(method))
    if is_recipe(search.start):
        start_genome(recipe, search, space)


def plan_objective(recipe: Recipe, options: MergeOptions) -> SearchObjective:
    """What a search is judged by, from the recipe and its data alone.

    Raises:
        RecipeError, MismatchError, SourceError, ResourceError: as `plan_search` does.
    """
    _need(recipe.search or Search())
    objective = parse_objective(recipe)
    splits = {
        name: replace(
            split, spec=split.spec.changed(device=options.device, threads=options.threads)
        )
        for name, split in objective.splits.items()
    }
    splits = _with_fewer_rows(splits, recipe.search)
    objective = replace(objective, splits=splits)
    refuse_overlap(objective, recipe)
    for split in splits.values():
        for task in split.spec.tasks:
            task.check_data(split.spec.seed)
    return objective


def _with_fewer_rows(
    splits: Mapping[SplitName, Split], search: Search | None
) -> dict[SplitName, Split]:
    """With the split search reduced to `rows` of each task, and all of it under ALL_ROWS.

    Tasks with `limit` keep theirs, and so do tasks of right and wrong answers, which are noisier.
    """
    if search is None or not search.method or not search.rows:
        return dict(splits)
    split = splits["search"]
    tasks = tuple(
        replace(task, limit=search.rows)
        if isinstance(task, LossTask | KL)
        and task.limit is None
        and len(read_rows(task.data)) > search.rows
        else task
        for task in split.spec.tasks
    )
    if tasks == split.spec.tasks:
        return dict(splits)
    fewer = replace(split, spec=replace(split.spec, tasks=tasks))
    return {**splits, "search": fewer, ALL_ROWS: replace(split, name=ALL_ROWS)}


def _need_one_frame(plan: Plan) -> None:
    """Every average of a greedy soup must be the same model but for its weights.

    Raises:
        RecipeError: whose config, tokenizer and head it has would depend on who is in it.
    """
    recipe = plan.recipe
    if reconcile_heads(plan.sources).lent:
        message = "some of these models tie their output head to the embedding, others do not."
        hint = "Save them alike first."
        raise RecipeError([recipe.problem("models", message, hint)])
    if plan.base is not None:
        return
    frames = {
        (json.dumps(dict(source.config), sort_keys=True), auxiliary_fingerprint(source.root))
        for source in plan.sources
    }
    if len(frames) > 1:
        message = "the models differ in config.json or tokenizer files, and the recipe has no base."
        hint = "Name a `base_model`: every average takes its config and tokenizer."
        raise RecipeError([recipe.problem("merge_method", message, hint)])


def _missing_splits(objective: SearchObjective, *, greedy: bool) -> list[str]:
    result = []
    if "test" not in objective.splits:
        by = "chosen" if "validation" in objective.splits else "searched"
        message = (
            "the objective has no task of the split `test`: the score that is reported is the "
        )
        result.append(f"{message}one that the result was {by} by")
    if "validation" not in objective.splits and not greedy:
        message = (
            "the objective has no task of the split `validation`: the result is the candidate "
        )
        result.append(f"{message}that fits the split `search` best")
    return result


def _need(search: Search) -> None:
    from importlib.util import find_spec

    package = {"cma-es": "cma", "tpe": "optuna", "nsga2": "optuna"}.get(search.optimizer)
    if package and search.method and find_spec(package) is None:
        hint = "pip install cma" if package == "cma" else "pip install 'merge-cli[evolve]'"
        raise ResourceError(f"{search.optimizer} needs the package {package}", hint=hint)
    if search.engine == "ray" and find_spec("ray") is None:
        raise ResourceError(
            "engine: ray needs the package ray", hint="pip install 'merge-cli[ray]'"
        )
