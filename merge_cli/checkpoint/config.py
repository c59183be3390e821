"""The output's config.json: a source's own, changed only where the merge changes the model.

What a config does not say are the defaults of its class, read from transformers' source. The class
is not imported, which would take seconds: its file is parsed. In version 5 these are annotated
attributes, in version 4 the arguments of `__init__`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.layer_config import LAYER_COUNTS, MAX_LAYERS, StackedLayers, stack_layers
from merge_cli.system.libraries import require

CLASS = "_class_name"  # in a config of diffusers: what opens the model
PREDICTING = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
)
_NESTED = ("text_config", "llm_config")
# transformers' classes with layers that are stored [in, out].
WITH_CONV1D = frozenset(
    (
        "gpt2",
        "openai-gpt",
        "imagegpt",
        "decision_transformer",
        "clvp",
        "clvp_decoder",
    )
)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: multimodal models nest it."""
    nested = next((config[name] for name in _NESTED if isinstance(config.get(name), dict)), config)
    assert isinstance(nested, dict)
    return nested


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers the config says that the language model has."""
    part = text_config(config)
    counts = (part.get(key) for key in LAYER_COUNTS)
    listed = (part.get(key) for key in ("layers_block_type", "layer_types"))  # Nemotron-H
    lengths = (len(kinds) for kinds in listed if isinstance(kinds, list))
    return next((count for count in (*counts, *lengths) if type(count) is int), None)


def predicting_layers(config: Mapping[str, Any]) -> int:
    """How many layers for multi-token prediction may be stored behind the last one."""
    counts = (text_config(config).get(key) for key in PREDICTING)
    return next((count for count in counts if type(count) is int and count > 0), 0)


def merged_config(
    source_config: Mapping[str, Any],
    *,
    dtype: str | None = None,
    tied: bool | None = None,
    layers: Sequence[tuple[Mapping[str, Any], int]] | None = None,
    doubts: list[str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """A source's config with what the merge has decided.

    Args:
        dtype: the one dtype of the output; None leaves the config source's word.
        tied: the output's tie_word_embeddings; None leaves it.
        layers: for each output layer, its source's config and its layer there; None leaves them.
        doubts: filled with rules by position that the stacked layers may not follow; without a
            list they are an error.

    Returns:
        The config and one line for each change.

    Raises:
        ValueError: stacked layers that no config can describe.
    """
    config: dict[str, Any] = json.loads(
        json.dumps(source_config)
    )  # a deep copy of what JSON can hold
    changes: list[str] = []
    # diffusers' configs have a class, and no dtype.
    declared = bool(source_config) and (
        CLASS not in source_config or bool(source_config.keys() & {"dtype", "torch_dtype"})
    )
    if dtype is not None and declared:
        # transformers 5 writes `dtype`, older files say `torch_dtype`.
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        if config.get(key) != dtype:
            changes.append(f"{key}: {config.get(key)} -> {dtype}")
            config[key] = dtype
        for name in _NESTED:
            nested = config.get(name)
            for inner in ("dtype", "torch_dtype"):
                if isinstance(nested, dict) and nested.get(inner) not in (None, dtype):
                    nested[inner] = dtype
    if tied is not None:
        for holder in (config, *(config[n] for n in _NESTED if isinstance(config.get(n), dict))):
            if holder is config or "tie_word_embeddings" in holder:
                if holder.get("tie_word_embeddings") != tied:
                    before = holder.get("tie_word_embeddings")
                    changes.append(f"tie_word_embeddings: {before} -> {tied}")
                holder["tie_word_embeddings"] = tied
    if layers is not None:
        changed = text_config(config)
        described = [(text_config(source), index) for source, index in layers]
        moved, uncertain = stack_layers(StackedLayers(changed, described, layer_count(config)))
        changes += moved
        if uncertain and doubts is None:
            raise ValueError(uncertain[0])
        (doubts if doubts is not None else []).extend(uncertain)
    return config, changes


def with_layer_types(config: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """A config with `layer_types` written out, where transformers derives it from positions.

    Stacked layers are at other positions, and would otherwise get another kind of attention.

    Raises:
        ResourceError: there is no transformers to ask.
    """
    explicit: dict[str, Any] = json.loads(json.dumps(config))
    target = text_config(explicit)
    given = {"layer_types", "layers_block_type"} & target.keys()
    if given or "model_type" not in explicit or (layer_count(config) or 0) > MAX_LAYERS:
        return explicit
    require("transformers", "stacking layers")
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(str(root), trust_remote_code=False).get_text_config()
        kinds = list(loaded.layer_types)
        key = type(loaded).attribute_map.get("layer_types", "layer_types")
        # Some classes count the kinds out and cannot be told them (Bamba, Jamba).
        again = type(loaded).from_dict({**target, key: kinds})
        if len(set(kinds)) > 1 and list(again.layer_types) == kinds:
            target[key] = kinds
    except Exception:
        # An architecture that this transformers does not know, a class without kinds of layers,
        # or a config that it refuses with whatever exception it has: nothing is derived.
        return explicit
    return explicit


def is_of_5(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5 or a later one has written a config."""
    version = config.get("transformers_version")
    major = re.match(r"(\d{1,4})\.", version) if isinstance(version, str) else None
    return major is not None and int(major.group(1)) >= 5


_TYPE = re.compile(r"[A-Za-z0-9_-]{1,80}")


@lru_cache(maxsize=64)
def class_defaults(model_type: str) -> Mapping[str, Any]:
    """Key -> value where a config of this type is silent; empty for a type that is not known."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None or not _TYPE.fullmatch(model_type):
        return {}
    models = Path(spec.origin).parent / "models"
    for file in _files(models, model_type.replace("-", "_")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue  # no file of transformers that is read here
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                result = dict(_attributes(node))
                if result.get("model_type") == model_type:
                    return result
    return {}


def _files(models: Path, name: str) -> Iterator[Path]:
    """Where a type may be: in the folder of its name, or of the whole that it is a part of."""
    parts = name.split("_")
    for count in range(len(parts), 0, -1):
        yield from sorted((models / "_".join(parts[:count])).glob("configuration_*.py"))


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for line in node.body:
        if isinstance(line, ast.FunctionDef) and line.name == "__init__":
            arguments = line.args.args[-len(line.args.defaults) :] if line.args.defaults else []
            for argument, default in zip(arguments, line.args.defaults, strict=True):
                yield from _value(argument.arg, default)
        elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield from _value(line.target.id, line.value)
        elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            yield from _value(line.targets[0].id, line.value)


def _value(name: str, node: ast.expr | None) -> Iterator[tuple[str, Any]]:
    """Literals; also of `interval(...)(default=0.02)`."""
    if isinstance(node, ast.Call):
        node = next((word.value for word in node.keywords if word.arg == "default"), None)
    try:
        if node is not None:
            yield name, ast.literal_eval(node)
    except ValueError:
        return  # computed: not known without running it
