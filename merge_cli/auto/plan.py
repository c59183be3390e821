"""What would be tried, in which order, on which rows: known without loading weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from typing import Any

from merge_cli.auto.checks import SEARCH, SOUP, methods_of
from merge_cli.auto.rows import Parts, load_parts
from merge_cli.auto.weights import candidate_count
from merge_cli.calibration.plan import plan_calibration
from merge_cli.dam.plan import plan_training
from merge_cli.data.sequences import short_names
from merge_cli.engine.device import device_of
from merge_cli.evaluation.empty import empty_model
from merge_cli.evaluation.live import context_of
from merge_cli.evaluation.tokenizers import one_tokenizer
from merge_cli.options import MergeOptions
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.automatic import Budget
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.statistics import Statistics, fitting_statistics
from merge_cli.recipe.training import WHOLE_STARTS, Training
from merge_cli.recipe.training_presets import preset
from merge_cli.recipe.values import Parameter

_JOURNAL = 3  # the form of its lines
# To learn from, where the recipe has no `training:`. Twice what `dam` alone takes: nothing else is
# measured there, so that it costs no more, and which rows they happen to be matters less.
_TOKENS = 65_536
LAMBDAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of task arithmetic


@dataclass(frozen=True)
class Step:
    """One merge that is tried.

    Attributes:
        name: for tables.
        method: fisher, regmean, search or dam where data decide the numbers; empty where nothing
            does.
        recipe: of the merge; for dam without its coefficients, for a search without its weights.
        tokens: that models read to make it, about; measuring it not counted.
        work: what a token costs, in forward passes, about.
        weights: of each source in a merge that a search can start from.
        begins_at_best: learning that is told where to start: at the best merge that was tried.
    """

    name: str
    method: str
    recipe: Recipe
    tokens: int = 0
    work: int = 1
    weights: tuple[float, ...] = ()
    begins_at_best: bool = False

    @property
    def start(self) -> Any:
        """What `training.start` calls this merge; None where learning cannot start at it."""
        if self.method in WHOLE_STARTS:
            return self.method
        if self.name == SOUP:
            return "soup"
        # Every source with one weight: task arithmetic, or the base.
        return self.weights[0] if len({*self.weights}) == 1 and self.recipe.base_model else None

    @property
    def prepares(self) -> bool:
        """Whether something is measured or learned of data before it can be merged."""
        return self.method not in ("", SEARCH)


@dataclass(frozen=True)
class AutomaticPlan:
    """The path, decided.

    Attributes:
        parts: the data of each source.
        steps: in order; the first one is the uniform soup.
        key: names the work: everything that losses depend on.
    """

    plan: Plan
    parts: tuple[Parts, ...]
    steps: tuple[Step, ...]
    budget: Budget
    key: str

    @property
    def validation_tokens(self) -> int:
        """What measuring one merge reads."""
        return self._tokens("validation")

    @property
    def test_tokens(self) -> int:
        """What the verdict on one merge reads."""
        return self._tokens("test")

    @property
    def final_tokens(self) -> int:
        """What measuring one of the last few reads."""
        return self._tokens("final")

    def _tokens(self, rows: str) -> int:
        return sum(part.tokens(rows) for part in self.parts)


def plan_automatic(plan: Plan, options: MergeOptions) -> AutomaticPlan:
    """Decide the path from headers, configs, tokenizers and data, and check every step of it.

    Raises:
        RecipeError, SourceError, MismatchError, ResourceError: as each step's own plan does; too
            few rows.
    """
    recipe = plan.recipe
    kind = device_of(options).kind
    if options.ray is not None:
        options = replace(options, device="cpu")  # the command's machine may have no GPU
    plan.aligned.refuse_rearranged(recipe, "auto")
    tokenizer, _ = one_tokenizer(plan)
    net = empty_model(plan)
    entries = net.get_input_embeddings().weight.shape[0]
    parts = load_parts(recipe, tokenizer, context_of(net.config, None), entries)
    candidate = sum(part.tokens("search") for part in parts)
    steps = (*_static_steps(recipe), *_steps_with_data(plan, options, candidate))
    return AutomaticPlan(
        plan, tuple(parts), steps, recipe.budget or Budget(), _key(plan, parts, steps, kind)
    )


def _static(recipe: Recipe, method: str, specs: Sequence[SourceSpec], **changes: Any) -> Recipe:
    plain = tuple(replace(spec, data=None) for spec in specs)
    nothing: dict[str, Any] = {"training": None, "statistics": None, "budget": None, "methods": ()}
    return recipe.with_result(method, models=plain, **{**nothing, **changes})


def _static_steps(recipe: Recipe) -> Iterator[Step]:
    """Merges that cost nothing but being measured; the soup is measured whatever the budget."""
    count = len(recipe.models)
    soup = _static(recipe, "soup", recipe.models)
    yield Step(SOUP, "", soup, weights=(1 / count,) * count)
    if recipe.base_model is not None:
        base = SourceSpec(recipe.base_model, "base_model")
        yield Step("base", "", _static(recipe, "soup", [base]), weights=(0.0,) * count)
    names = short_names([str(spec.model) for spec in recipe.models])
    for i, (spec, name) in enumerate(zip(recipe.models, names, strict=True)):
        alone = tuple(float(i == j) for j in range(count))
        yield Step(f"source {name}", "", _static(recipe, "soup", [spec]), weights=alone)
    if "task_arithmetic" in methods_of(recipe):
        for scale in LAMBDAS:
            parameters = {"lambda": Parameter("lambda", scale, "parameters.lambda")}
            merge = _static(recipe, "task_arithmetic", recipe.models, parameters=parameters)
            yield Step(f"task arithmetic {scale:g}", "", merge, weights=(scale,) * count)


def _steps_with_data(plan: Plan, options: MergeOptions, candidate: int) -> Iterator[Step]:
    """Statistics, then a search, then learning: from the train part alone.

    Args:
        candidate: tokens that measure one candidate of the search.
    """
    recipe, methods = plan.recipe, methods_of(plan.recipe)
    specs = tuple(
        replace(spec, data=replace(spec.data, part="train")) for spec in recipe.models if spec.data
    )
    for method, kind, work in (("fisher", "fisher", 4), ("regmean", "gram", 2)):
        if method in methods:
            merge = recipe.with_result(
                method,
                models=specs,
                training=None,
                statistics=recipe.statistics and fitting_statistics(recipe.statistics, kind),
                budget=None,
                methods=(),
            )
            measured = plan_calibration(make_plan(merge), options.device)
            tokens = sum(part.examples.tokens for part in measured.parts)
            yield Step(method, method, merge, tokens, work)
    if SEARCH in methods:
        merge = _static(recipe, "task_arithmetic" if recipe.base_model else "soup", recipe.models)
        yield Step(SEARCH, SEARCH, merge, candidate_count(len(recipe.models)) * candidate)
    if "dam" in methods:
        merge = recipe.with_result("dam", models=specs, budget=None, methods=())
        is_told = _is_told_start(recipe)
        if is_told:
            # `Trials` says where it starts. What is gathered then is what was gathered before it.
            learning = replace(_asked(recipe), start="soup", baselines=False)
            statistics = recipe.statistics or Statistics()
            merge = replace(merge, training=learning, statistics=statistics)
        training = plan_training(make_plan(merge), options.device)
        tokens = sum(len(item.ids) for data in training.datasets for item in data.train)
        yield Step("dam", "dam", merge, tokens, 6, begins_at_best=is_told)


def _is_told_start(recipe: Recipe) -> bool:
    """Whether the steps before learning measure what it could start at."""
    asked, methods = _asked(recipe), methods_of(recipe)
    is_free = asked.start == "best" and asked.baselines and asked.form != "soup"
    return is_free and any(method in methods for method in WHOLE_STARTS)


def _asked(recipe: Recipe) -> Training:
    return recipe.training or replace(preset("default"), tokens=_TOKENS)


def _key(plan: Plan, parts: Sequence[Parts], steps: Sequence[Step], device: str) -> str:
    """A fingerprint of everything that losses depend on; a budget only says how far it goes."""
    recipe = plan.recipe
    settings = [
        {f.name: repr(getattr(section, f.name)) for f in fields(section)} if section else None
        for section in (recipe.training, recipe.statistics)
    ]
    about = {
        "versions": [version(name) for name in ("merge-cli", "torch", "transformers")],
        "inputs": [source.fingerprint() for source in plan.sources],
        "models": [str(spec.model) for spec in recipe.models],
        "dtype": recipe.output_dtype,
        "seed": recipe.seed,
        "data": [part.digest for part in parts],
        "steps": [step.name for step in steps],
        "settings": settings,
        "device": device,
        "journal": _JOURNAL,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
