"""What a search is known by: a digest of all that its scores, or its result, depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version

from merge_cli.engine.device import choose_device
from merge_cli.engine.merge import verified_fingerprints
from merge_cli.engine.options import MergeOptions
from merge_cli.engine.plan import Plan
from merge_cli.evaluation.digest import auxiliary_fingerprint
from merge_cli.evolve.plan import SearchPlan, plan_search
from merge_cli.recipe.search import Search
from merge_cli.recipe.values import Parameter

# What changes how long a search goes on, or who does the work, but not what a candidate is worth.
_INDIFFERENT = {"evaluations", "finalists", "failures", "engine", "workers", "given"}
_FORMAT = 1


def search_digest(plan: Plan, device: str) -> str:
    """A digest of everything that a search's result depends on.

    Raises:
        as `plan_search` does.
    """
    options = MergeOptions(device=device)
    decided = plan_search(plan, options)
    asked = f"{decided.search.evaluations} {decided.search.finalists}"
    return f"{work_key(decided, options)} {asked}"


def work_key(decided: SearchPlan, options: MergeOptions) -> str:
    """A digest of everything that the scores depend on."""
    recipe, plan = decided.recipe, decided.plan
    dials = {
        f.name: repr(getattr(decided.search, f.name))
        for f in fields(Search)
        if f.name not in _INDIFFERENT
    }
    splits = {
        name: {
            "tasks": [task.identity() for task in split.spec.tasks],
            "goals": [repr(goal) for goal in split.goals],
            "how": [
                split.spec.seed,
                split.spec.max_length,
                split.spec.batch_tokens,
                split.spec.dtype,
            ],
        }
        for name, split in decided.objective.splits.items()
    }
    about = {
        "format": _FORMAT,
        "versions": [version(package) for package in ("merge-cli", "torch", "transformers")],
        "method": recipe.merge_method,
        "dials": dials,
        "static": [_plain(recipe.parameters), *(_plain(spec.parameters) for spec in recipe.models)],
        "seed": recipe.seed,
        "dtype": recipe.output_dtype,
        "inputs": verified_fingerprints(plan),
        "models": [str(spec.model) for spec in recipe.models],
        "tokenizer": auxiliary_fingerprint(plan.sources[plan.tokenizer_donor].root),
        "splits": splits,
        "device": choose_device(options.device).kind,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _plain(parameters: Mapping[str, Parameter]) -> list[str]:
    return [repr((name, parameter.setting)) for name, parameter in sorted(parameters.items())]
