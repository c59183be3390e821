"""A resolved recipe as YAML: defaults, seed and revisions written out, paths that lead from it.

Running it again gives the same bytes. Local paths are written relative to the folder that the file
will lie in, so that the pair of model and recipe says nothing of the machine it was made on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from merge_cli.recipe.data import Data
from merge_cli.recipe.reference import ModelRef, local_file, local_folder, parse_reference
from merge_cli.recipe.schema import Parameters, Recipe, SliceSpec, SourceSpec
from merge_cli.recipe.statistics import plain_statistics
from merge_cli.recipe.tokenizer import BASE, UNION, TokenizerSpec
from merge_cli.recipe.training import plain_training
from merge_cli.recipe.values import Gradient, Setting

Locate = Callable[[ModelRef], str]


def dump_recipe(
    recipe: Recipe,
    *,
    locate: Locate,
    defaults: Mapping[str, Any],
    inputs: Mapping[str, str],
    coefficients: str | None = None,
    statistics: str | None = None,
    header: str = "",
    data: Callable[[str], str] | None = None,
    kind: str = "",
) -> str:
    """The recipe's YAML.

    Args:
        locate: how each model is written.
        defaults: global parameters that the recipe left to the method.
        inputs: model, as `locate` writes it -> digest.
        coefficients: how the file of learned coefficients is written; the data that they were
            learned from is then not needed, and is left out.
        statistics: how the folder of gathered statistics is written; likewise.
        header: a comment for the first line.
        data: how a data file is written; None leaves the models' data out.
        kind: of the statistics that are gathered from them, if any are.
    """
    document: dict[str, Any] = {"merge_method": recipe.merge_method}
    if recipe.name:
        document["name"] = recipe.name
    if recipe.base_model:
        document["base_model"] = locate(recipe.base_model)
    if recipe.models:
        document["models"] = [_source(spec, locate, data) for spec in recipe.models]
    elif recipe.slices:
        document["slices"] = _slices(recipe.slices, locate)
    else:
        document["modules"] = {
            module.name: _with_parameters(
                {"models": [_source(spec, locate) for spec in module.slices[0].sources]}
                if module.whole
                else {"slices": _slices(module.slices, locate)},
                module.parameters,
            )
            for module in recipe.modules
        }
    parameters = {**defaults, **_plain(recipe.parameters)}
    if parameters:
        document["parameters"] = parameters
    for key in ("dtype", "out_dtype"):
        if getattr(recipe, key):
            document[key] = getattr(recipe, key)
    if recipe.tokenizer:
        document["tokenizer"] = _tokenizer(recipe.tokenizer, recipe.folder, locate)
    if recipe.chat_template:
        document["chat_template"] = recipe.chat_template
    if recipe.output:
        document["output"] = recipe.output.plain()
    document["seed"] = recipe.seed
    if recipe.budget:
        limits = {"minutes": recipe.budget.minutes, "tokens": recipe.budget.tokens}
        document["budget"] = {key: limit for key, limit in limits.items() if limit is not None}
    if recipe.methods:
        document["methods"] = list(recipe.methods)
    if recipe.training:
        document["training"] = plain_training(recipe.training)
    if statistics:
        document["statistics"] = statistics
    elif recipe.statistics and kind:
        document["statistics"] = plain_statistics(recipe.statistics, kind)
    if coefficients:
        document["coefficients"] = coefficients
    if recipe.metadata:
        document["metadata"] = dict(recipe.metadata)
    if inputs:
        document["inputs"] = dict(inputs)
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    return f"# {header}\n{body}" if header else body


def path_from(target: Path, folder: Path, commits: Mapping[str, str]) -> Locate:
    """Writes models for a file in `target`: local ones as relative paths, Hub ones with commits.

    Args:
        folder: where the recipe's own relative paths start.
        commits: model, or adapter, as the recipe names it -> the commit it was resolved to.
    """

    def locate(model: ModelRef) -> str:
        if model.lora:
            base, adapter = (
                ModelRef(model.path, model.revision),
                ModelRef(model.lora, model.lora_revision),
            )
            return f"{locate(base)}+{locate(adapter)}"
        local_path = local_folder(model.path, folder)
        if local_path is not None:
            # realpath, or a link on the way would make the dots lead elsewhere.
            relative = os.path.relpath(os.path.realpath(local_path), os.path.realpath(target))
            return relative if relative.startswith(".") else f"./{relative}"
        commit = commits.get(str(model), model.revision)
        return f"{model.path}@{commit}" if commit else model.path

    return locate


def _slices(slices: Iterable[SliceSpec], locate: Locate) -> list[dict[str, Any]]:
    return [
        _with_parameters(
            {
                "sources": [_source(s, locate) for s in output_slice.sources],
                **(
                    {"base_model": locate(output_slice.base_model)}
                    if output_slice.base_model
                    else {}
                ),
            },
            output_slice.parameters,
        )
        for output_slice in slices
    ]


def _tokenizer(spec: TokenizerSpec, folder: Path, locate: Locate) -> dict[str, Any]:
    if spec.truncate:
        return {"truncate": True}
    word = spec.source
    named = word in (UNION, BASE)
    section: dict[str, Any] = {"source": word if named else locate(parse_reference(word, folder))}
    tokens = {}
    for token, rule in spec.tokens.items():
        source: Any = {"kind": "zero"} if rule.zero else None
        if rule.model is not None:
            source = locate(rule.model)
            if rule.token is not None or rule.token_id is not None:
                which = (
                    {"token": rule.token} if rule.token is not None else {"token_id": rule.token_id}
                )
                source = {"kind": "model_token", "model": source, **which}
        tokens[token] = {
            **({"source": source} if source is not None else {}),
            **({"force": True} if rule.force else {}),
        }
    if tokens:
        section["tokens"] = tokens
    if spec.pad_to_multiple_of:
        section["pad_to_multiple_of"] = spec.pad_to_multiple_of
    return section


def data_from(target: Path, folder: Path) -> Callable[[str], str]:
    """Writes data files for a recipe in `target`, as `path_from` writes local models."""

    return _relative(target, lambda word: local_file(word, folder))


def folder_from(target: Path, folder: Path) -> Callable[[str], str]:
    """Writes folders of statistics for a recipe in `target`."""
    return _relative(target, lambda word: local_folder(word, folder))


def _relative(target: Path, find: Callable[[str], Path | None]) -> Callable[[str], str]:
    def locate(word: str) -> str:
        local_path = find(word)
        if local_path is None:
            return word
        return os.path.relpath(os.path.realpath(local_path), os.path.realpath(target))

    return locate


def _source(
    spec: SourceSpec, locate: Locate, data: Callable[[str], str] | None = None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": locate(spec.model)}
    if spec.data is not None and data is not None:
        entry["data"] = _data(spec.data, data)
    if spec.layer_range:
        entry["layer_range"] = list(spec.layer_range)
    return _with_parameters(entry, spec.parameters)


def _data(data: Data, locate: Callable[[str], str]) -> dict[str, Any]:
    """Held-out files are left out: only what learns has a use for them, and it keeps no data."""
    part = {} if data.part == "all" else {"part": data.part}
    if data.files:
        return {"files": [locate(word) for word in data.files], **part}
    chosen = {"config": data.config, "split": data.split, "revision": data.revision}
    return {"dataset": data.dataset, **{k: v for k, v in chosen.items() if v is not None}, **part}


def _with_parameters(entry: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
    return {**entry, "parameters": _plain(parameters)} if parameters else entry


def _plain(parameters: Parameters) -> dict[str, Any]:
    return {name: plain_setting(parameter.setting) for name, parameter in parameters.items()}


def plain_setting(setting: Setting) -> Any:
    """A setting as YAML writes it."""
    if isinstance(setting, tuple):
        return [
            {**({"filter": rule.filter} if rule.filter else {}), "value": plain_setting(rule.value)}
            for rule in setting
        ]
    return list(setting.values) if isinstance(setting, Gradient) else setting
