"""Plans of recipes with several documents, all of them made before any work begins.

What a document makes can be planned with before it is there, since its plan knows every header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from merge_cli.checkpoint.components import inside
from merge_cli.checkpoint.headers import TensorRef, parse_header
from merge_cli.errors import HubError, RecipeError
from merge_cli.planning.auxiliary import write_auxiliary_files
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import DEFAULT_SHARD_SIZE, make_plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.planning.sweep import plan_sweep
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.reference import ModelRef, hub_id, stage_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source


def plan_recipe(recipe: Recipe, *, shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Plan a recipe and, before it, its stages: `make_plan` for recipes of any number of documents.

    Raises:
        as `make_plan` does, for any of the documents.
    """
    if recipe.output is not None:
        from merge_cli.planning.adapters import plan_adapters  # which few recipes need

        return plan_adapters(recipe)
    if recipe.sweep:
        return plan_sweep(recipe, shard_size=shard_size)
    if not recipe.stages:
        return make_plan(recipe, shard_size=shard_size)
    plans: dict[str, Plan] = {}
    made: dict[str, Source] = {}
    with TemporaryDirectory() as folder:  # for what planning reads besides headers: tokenizers
        for stage in recipe.stages:
            assert stage.name, "only the result may go without a name"
            plan = plans[stage.name] = _plan_one(stage, shard_size, made, plans)
            made[stage.name] = _to_be_made(stage.name, plan, Path(folder))
        return _plan_one(recipe, shard_size, made, plans)


def over_results(plan: Plan, folders: Mapping[str, Path]) -> Plan:
    """The same plan over what stages have made by now.

    A preparation opens the models again: its recipe names their folders.

    Args:
        folders: those of the stages' results, by name.

    Raises:
        CorruptFileError: a result is not what it was.
    """
    made = [source.label for source in plan.sources if source.label in plan.stages]
    if preparations_of(plan):
        spelling = {model: model for model in plan.recipe.references}
        spelling |= {ModelRef(name): ModelRef(str(folders[name])) for name in made}
        recipe = replace(_tokenizer_of(plan.recipe, folders).with_models(spelling), stages=())
        return make_plan(recipe, shard_size=plan.shard_size)
    opened = {name: _opened(name, folders[name]) for name in made}
    return make_plan(plan.recipe, shard_size=plan.shard_size, made=opened, stages=plan.stages)


def _tokenizer_of(recipe: Recipe, folders: Mapping[str, Path]) -> Recipe:
    """The recipe, whose tokenizer section names folders where it named stages."""
    spec = recipe.tokenizer
    if spec is None:
        return recipe
    rules = {
        token: replace(rule, model=ModelRef(str(folders[rule.model.path])))
        if rule.model is not None and rule.model.path in folders
        else rule
        for token, rule in spec.tokens.items()
    }
    source = str(folders.get(spec.source, spec.source))
    return replace(recipe, tokenizer=replace(spec, source=source, tokens=rules))


def needed(plan: Plan) -> tuple[str, ...]:
    """The stages that a result is made of, directly or not, in the order of their making."""
    result: set[str] = set()
    for source in plan.sources:
        if source.label in plan.stages:
            result |= {source.label, *needed(plan.stages[source.label])}
    return tuple(name for name in plan.stages if name in result)


def unused(plan: Plan) -> set[str]:
    """The stages that no other document merges: results of their own."""
    used = {source.label for item in (plan, *plan.stages.values()) for source in item.sources}
    return plan.stages.keys() - used


def _plan_one(
    recipe: Recipe, shard_size: int, made: Mapping[str, Source], plans: Mapping[str, Plan]
) -> Plan:
    try:
        return make_plan(recipe, shard_size=shard_size, made=made, stages=dict(plans))
    except HubError as error:
        # One word, and the Hub has it not: more likely a document than a model.
        spec = next((s for s in recipe.source_specs if str(s.model) == error.model), None)
        key = spec.key if spec else "base_model"
        key = f"{key}.model" if f"{key}.model" in recipe.positions else key
        if not plans or "/" in error.model or not hub_id(error.model):
            raise
        message = (
            f"'{error.model}' is no document of this file, no folder, and not had from the Hub."
        )
        raise RecipeError([recipe.problem(key, message, nearest(error.model, plans))]) from error


def _to_be_made(name: str, plan: Plan, folder: Path) -> Source:
    """A stage's result as later stages will find it, from its plan alone: all but its weights."""
    root = folder / stage_folder(name)
    root.mkdir()
    write_auxiliary_files(plan, root)
    tensors: dict[str, TensorRef] = {}
    for shard in plan.shards:
        stored = parse_header(shard.header, root / shard.file, shard.size, name)
        for short_name, ref in stored.items():
            full_name = inside(shard.folder, short_name)
            tensors[full_name] = ref._replace(name=full_name)
    headers = {shard.file: shard.header for shard in plan.shards}
    return Source(name, root, plan.config, tensors, headers, planned=True)


def _opened(name: str, folder: Path) -> Source:
    source = open_source(ModelRef(str(folder)), folder.parent)
    tensors = {ref.name: ref for refs in source.tensors.values() for ref in refs.stored}
    renamed = {key: ref._replace(model=name) for key, ref in tensors.items()}
    return Source(
        name,
        source.root,
        source.config,
        renamed,
        source.header_bytes,
        fingerprints=source.fingerprints,
    )
