"""What is done with each kind of mutated input, and what must hold where it is accepted."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import merge_cli
from fuzzing.models import SHARDED
from fuzzing.mutations import mutate_bytes, mutate_header, mutate_json, mutate_yaml
from merge_cli.errors import Interrupted
from merge_cli.evaluation.parse import read_eval
from merge_cli.evaluation.rows import read_rows
from merge_cli.options import MergeOptions
from merge_cli.planning.preparation import preparations_of

SOUP = {"merge_method": "soup", "models": ["./a", "./b"]}
UNION = {
    "merge_method": "ties",
    "base_model": "./a",
    "tokenizer": {"source": "union"},
    "models": [{"model": "./b", "parameters": {"density": 0.5}}, "./c"],
    "chat_template": "auto",
}
ADAPTED = {"merge_method": "task_arithmetic", "base_model": "./a", "models": ["./a+./adapter"]}
RECIPES: tuple[dict[str, Any], ...] = (
    SOUP,
    UNION,
    ADAPTED,
    {
        "merge_method": "slerp",
        "base_model": "./a",
        "models": ["./a", "./b"],
        "dtype": "bfloat16",
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]},
    },
    {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "./a", "layer_range": [0, 1]}]},
            {"sources": [{"model": "./b", "layer_range": [0, 2], "parameters": {"scale": 0.5}}]},
        ],
    },
    {
        "merge_method": "dare_ties",
        "base_model": "./a",
        "seed": 3,
        "metadata": {"license": "mit"},
        "models": [
            {"model": "./b", "parameters": {"weight": [0.1, 0.9], "density": 0.5}},
            {"model": "./c", "parameters": {"weight": 0.5}},
        ],
        "parameters": {"normalize": True, "lambda": 0.7},
        "out_dtype": "float16",
        "name": "mine",
    },
    {
        "merge_method": "dam",
        "base_model": "./a",
        "training": {"epochs": 1, "learning_rate": 0.001},
        "models": [{"model": "./b", "data": "rows.jsonl"}, {"model": "./c", "data": "rows.jsonl"}],
    },
    {
        "merge_method": "evolutionary",
        "base_model": "./a",
        "models": ["./b", "./c"],
        "seed": 1,
        "search": {
            "method": "ties",
            "parameters": {"weight": {"min": 0, "max": 1}},
            "evaluations": 4,
        },
        "objective": [{"task": "loss", "data": "rows.jsonl"}],
    },
    {
        "merge_method": "regmean",
        "models": [{"model": "./a", "data": "rows.jsonl"}, {"model": "./b", "data": "rows.jsonl"}],
    },
)
EVAL = {
    "seed": 1,
    "limit": 2,
    "tasks": [
        {"task": "loss", "data": "rows.jsonl", "name": "one"},
        {"task": "exact_match", "data": "rows.jsonl", "extract": "(w.)+", "stop": ["x"]},
    ],
}


class Wrong(Exception):
    """An accepted input whose output is not what it must be."""


@dataclass(frozen=True)
class Target:
    """A kind of input: `change` writes a mutation into a copy of the inputs, `use` is what a user
    would do with it."""

    name: str
    change: Callable[[Path, random.Random], None]
    use: Callable[[Path, random.Random], None]


def _in_file(names: tuple[str, ...], mutate: Callable[[bytes, random.Random], bytes]) -> Any:
    def change(root: Path, draw: random.Random) -> None:
        path = root / draw.choice(names)
        path.write_bytes(mutate(path.read_bytes(), draw))

    return change


def _merged(root: Path, recipe: Any) -> dict[str, Any]:
    """Plan and merge; the tensors of the output."""
    from safetensors.torch import load_file

    path = root / "recipe.yaml"
    if recipe is not None:
        path.write_text(json.dumps(recipe))
    plan = merge_cli.plan(path)
    if preparations_of(plan):
        return {}  # planned alone: what follows takes seconds
    out = root / "out"
    merge_cli.merge(plan, out, options=MergeOptions(device="cpu", threads=1))
    for file in out.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for file in out.glob("*.safetensors"):
        found |= {name: value.float().numpy() for name, value in load_file(file).items()}
    return found


def _official(folder: Path) -> dict[str, Any]:
    """A model as the safetensors library reads it; by the index where there is one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    files = [folder / "model.safetensors"]
    if (folder / SHARDED).exists():
        shards = json.loads((folder / SHARDED).read_bytes())["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    found: dict[str, Any] = {}
    for file in files:
        try:
            found |= load_file(file)
        except SafetensorError as error:
            raise Wrong(f"merged, and safetensors refuses {file.name}: {error}") from None
    return found


def _weights(root: Path, draw: random.Random) -> None:
    """Whatever is accepted is the mean of what the safetensors library reads."""
    found = _merged(root, SOUP)
    a, b = _official(root / "a"), _official(root / "b")
    for name, value in found.items():
        with np.errstate(all="ignore"):
            mean = (a[name].astype(np.float64) + b[name].astype(np.float64)) / 2
        if not np.allclose(value, mean, rtol=1e-2, atol=1e-6):
            raise Wrong(f"{name} is not the mean of its sources")
    if found.keys() != a.keys() & b.keys() or len(found) != 21:
        raise Wrong(f"{len(found)} tensors")


def _same_weights(recipe: Any) -> Callable[[Path, random.Random], None]:
    """Whatever is accepted has finite weights."""

    def use(root: Path, draw: random.Random) -> None:
        for name, value in _merged(root, recipe).items():
            if not np.isfinite(value.astype(np.float64)).all():
                raise Wrong(f"{name} is not finite")

    return use


def _recipe(root: Path, draw: random.Random) -> None:
    tree = draw.choice(RECIPES)
    text = yaml.safe_dump(tree, sort_keys=False)
    (root / "recipe.yaml").write_bytes(mutate_yaml(text, tree, draw))


def _eval(root: Path, draw: random.Random) -> None:
    text = yaml.safe_dump(EVAL, sort_keys=False)
    (root / "eval.yaml").write_bytes(mutate_yaml(text, EVAL, draw))


def _read_rows(root: Path, draw: random.Random) -> None:
    for row in read_rows(root / "rows.jsonl"):
        for key in ("text", "prompt", "completion"):
            if key in row.fields:
                row.text(key)


def _mutate_rows(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = mutate_json(lines[at] or b"{}", draw)
    return b"\n".join(lines)


def _card(content: bytes, draw: random.Random) -> bytes:
    front = "license: mit\nlanguage: [en, no]\ntags: [a]\n"
    changed = mutate_yaml(front, yaml.safe_load(front), draw)
    return b"---\n" + changed + b"\n---\n# card\n"


def _journal(root: Path, draw: random.Random) -> None:
    """A merge that was stopped midway, and one of the files that it left."""
    (root / "recipe.yaml").write_text(json.dumps(SOUP))
    stop = draw.randrange(1, 4)

    def show(progress: Any) -> None:
        nonlocal stop
        stop -= progress.done > 0
        if stop <= 0:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt, Interrupted):
        merge_cli.merge(
            root / "recipe.yaml",
            root / "out",
            on_progress=show,
            options=MergeOptions(device="cpu", threads=1),
        )
    left = [
        p for p in (root / "out.partial").rglob("*") if p.is_file() and p.suffix != ".safetensors"
    ]
    for path in draw.sample(left, min(1, len(left))):
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))


_TOKENIZER = tuple(
    f"{m}/{f}"
    for m in ("a", "c")
    for f in (
        "tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
        "generation_config.json",
        "preprocessor_config.json",
    )
)
_SHARDS = ("a/model.safetensors", "b/model-00001-of-00002.safetensors")
TARGETS = (
    Target("header", _in_file(_SHARDS, mutate_header), _weights),
    Target("index", _in_file((f"b/{SHARDED}",), mutate_json), _weights),
    Target(
        "config", _in_file(("a/config.json", "b/config.json"), mutate_json), _same_weights(UNION)
    ),
    Target("tokenizer", _in_file(_TOKENIZER, mutate_json), _same_weights(UNION)),
    Target(
        "adapter", _in_file(("adapter/adapter_config.json",), mutate_json), _same_weights(ADAPTED)
    ),
    Target(
        "adapter header",
        _in_file(("adapter/adapter_model.safetensors",), mutate_header),
        _same_weights(ADAPTED),
    ),
    Target("card", _in_file(("a/README.md",), _card), _same_weights(SOUP)),
    Target("recipe", _recipe, _same_weights(None)),
    Target("evaluation", _eval, lambda root, draw: void(read_eval(root / "eval.yaml"))),
    Target("rows", _in_file(("rows.jsonl",), _mutate_rows), _read_rows),
    Target("journal", _journal, _weights),
)


def void(_: object) -> None:
    """A result that nobody needs."""
