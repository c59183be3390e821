"""Do outputs keep their bytes? SHA-256 of what many recipes write, before and after a change.

    python scripts/check_bytes.py --write before.json        # on the commit before
    python scripts/check_bytes.py --against before.json      # after: exit 1 if a byte moved

Merges the model family in zoo/ with every recipe in configs/ (learned and searched ones shortened
as they are there) and with recipes over other kinds of sources: slices, gradients, adapters,
merged vocabularies, fp8, several documents, shards. Weights, config.json and tokenizer files count;
reports, which hold times and versions, do not. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import yaml

import merge_cli

ROOT = Path(__file__).resolve().parent.parent
_NOT_COUNTED = ("merge_report", "merge_recipe", "README.md", "statistics", "training", "search")
_PAIR = [{"model": "ZOO/math"}, {"model": "ZOO/japanese"}]
_WEIGHTED = [
    {"model": "ZOO/math", "parameters": {"weight": 0.7}},
    {"model": "ZOO/code", "parameters": {"weight": 0.4}},
]
RECIPES: dict[str, object] = {
    "gradient and filters": {
        "merge_method": "soup",
        "models": [
            {"model": "ZOO/math", "parameters": {"weight": [0.1, 0.9, 0.4]}},
            {
                "model": "ZOO/code",
                "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": [1.0, 0.2]}]},
            },
        ],
    },
    "stacked slices": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "ZOO/math", "layer_range": [0, 4]}]},
            {"sources": [{"model": "ZOO/code", "layer_range": [2, 6]}]},
        ],
    },
    "slerp by slices": {
        "merge_method": "slerp",
        "base_model": "ZOO/math",
        "slices": [
            {
                "sources": [
                    {"model": "ZOO/math", "layer_range": [0, 6]},
                    {"model": "ZOO/code", "layer_range": [0, 6]},
                ]
            }
        ],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.4}]},
    },
    "adapters on a base": {
        "merge_method": "task_arithmetic",
        "base_model": "ZOO/base",
        "models": [
            {"model": "ZOO/base+MADE/math", "parameters": {"weight": 0.6}},
            {"model": "ZOO/base+MADE/code", "parameters": {"weight": 0.5}},
        ],
    },
    "adapters with one another": {
        "merge_method": "ties",
        "base_model": "ZOO/base",
        "models": [
            {"model": "ZOO/base+MADE/math-factors"},
            {"model": "ZOO/base+MADE/code-factors"},
        ],
        "parameters": {"weight": 0.6, "density": 0.5},
        "output": "adapter",
    },
    "union of vocabularies": {
        "merge_method": "soup",
        "models": _PAIR,
        "tokenizer": {"source": "union"},
    },
    "fp8 out": {"merge_method": "soup", "models": _PAIR, "out_dtype": "fp8"},
    "float32 out of ties over the model": {
        "merge_method": "ties",
        "base_model": "ZOO/base",
        "models": _WEIGHTED,
        "dtype": "float32",
        "parameters": {"density": 0.3, "trim": "model"},
    },
    "two documents": [
        {"name": "first", "merge_method": "soup", "models": _PAIR},
        {
            "merge_method": "slerp",
            "base_model": "first",
            "models": [{"model": "first"}, {"model": "ZOO/code"}],
            "parameters": {"t": 0.3},
        },
    ],
}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every counted file; where the clone lies does not count."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(_portable(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(_NOT_COUNTED)
    }


def _portable(path: Path) -> bytes:
    content = path.read_bytes()
    return content if path.suffix == ".safetensors" else content.replace(bytes(ROOT), b"ROOT")


def measure(parts: list[str]) -> dict[str, dict[str, str]]:
    """Run everything whose name has one of the parts (all without)."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)

        def note(name: str, folder: Path) -> None:
            found[name] = digests(folder)
            print(f"{name}: {len(found[name])} files", file=sys.stderr, flush=True)

        for name in ("math", "code"):
            model, base = str(ROOT / "zoo" / name), str(ROOT / "zoo/base")
            merge_cli.extract_lora(model, work / name, base=base, rank=8)
            note(f"extract-lora {name}", work / name)
            # Adapters that replace tensors cannot be merged with one another.
            factors = work / f"{name}-factors"
            merge_cli.extract_lora(model, factors, base=base, rank=8, exclude=["norm", "embed"])
        recipes = {f"configs/{p.name}": p for p in sorted((ROOT / "configs").glob("*.yaml"))}
        for name, document in RECIPES.items():
            path = work / f"{name}.yaml"
            documents = document if isinstance(document, list) else [document]
            text = yaml.safe_dump_all(documents, sort_keys=False)
            path.write_text(text.replace("ZOO/", f"{ROOT}/zoo/").replace("MADE/", f"{work}/"))
            recipes[name] = path
        for name, path in recipes.items():
            if not parts or any(part in name for part in parts):
                out = work / "out" / name.replace("/", "-")
                note(name, merge_cli.merge(path, out).path)
        out = work / "out" / "shards"
        note(
            "soup in shards",
            merge_cli.merge(recipes["configs/soup.yaml"], out, shard_size=2_000_000).path,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="only recipes whose name has one of these parts")
    parser.add_argument("--write", type=Path, help="keep the digests here")
    parser.add_argument("--against", type=Path, help="compare with digests that --write has kept")
    given = parser.parse_args()
    found = measure(given.parts)
    if given.write:
        given.write.write_text(json.dumps(found, indent=1) + "\n")
    if not given.against:
        return 0
    before = json.loads(given.against.read_text())
    shared = [name for name in found if name in before]
    moved = [
        f"{name}: {file}"
        for name in shared
        for file in sorted(before[name].keys() | found[name].keys())
        if before[name].get(file) != found[name].get(file)
    ]
    print("\n".join([*moved, f"{len(shared)} outputs compared, {len(moved)} files differ"]))
    return bool(moved)


if __name__ == "__main__":
    sys.exit(main())
