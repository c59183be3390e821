"""The same recipes through mergekit 0.1.5 and through merge-cli: how far apart are the results?

    python -m venv .venv-mergekit && .venv-mergekit/bin/pip install mergekit==0.1.5
    python scripts/compare_mergekit.py --mergekit .venv-mergekit/bin/mergekit-yaml

Makes a tiny Llama family in float32 (and two Mistral 3 models, for modules), runs each recipe
through both, and prints a Markdown table:
the largest difference over all tensors, in units in the last place of the tensor's largest weight,
and the share of elements that are the same to the bit.
mergekit lives in an environment of its own; nothing of it is imported here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

ALL = ["a", "b", "c"]
EYES = ["eyes", "sight"]


def weighted(names: list[str], **parameters: list[float]) -> list[dict[str, Any]]:
    """Models with one value of each parameter."""
    return [
        {"model": name, "parameters": {key: values[i] for key, values in parameters.items()}}
        for i, name in enumerate(names)
    ]


WEIGHTS = [1.0, 0.5, 0.7]
Documents = dict[str, Any] | list[dict[str, Any]]  # several: stages, for mergekit-multi
CASES: dict[str, Documents] = {
    "linear": {"merge_method": "linear", "models": weighted(ALL, weight=WEIGHTS)},
    "linear, not normalized": {
        "merge_method": "linear",
        "models": weighted(ALL, weight=WEIGHTS),
        "parameters": {"normalize": False},
    },
    "linear, gradient and filter": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": [0.1, 0.9]}},
            {
                "model": "b",
                "parameters": {
                    "weight": [{"filter": "mlp", "value": 0.3}, {"value": [1.0, 0.2, 0.6]}]
                },
            },
        ],
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": weighted(ALL, weight=WEIGHTS),
        "parameters": {"lambda": 0.8},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": weighted(ALL, weight=WEIGHTS, density=[0.5, 0.7, 0.3]),
        "parameters": {"normalize": True, "lambda": 0.9},
    },
    "ties, not normalized": {
        "merge_method": "ties",
        "base_model": "base",
        "models": weighted(ALL, weight=WEIGHTS, density=[0.5, 0.7, 0.3]),
        "parameters": {"normalize": False},
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [0, 4]},
                    {"model": "b", "layer_range": [0, 4]},
                ]
            }
        ],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.4}]},
    },
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4]}]},
        ],
    },
    "passthrough, scaled": {
        "merge_method": "passthrough",
        "slices": [
            {
                "sources": [
                    {
                        "model": "a",
                        "layer_range": [0, 4],
                        "parameters": {
                            "scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]
                        },
                    }
                ]
            }
        ],
    },
    **{
        name: {
            "merge_method": name,
            "base_model": "base",
            "models": weighted(ALL, weight=WEIGHTS, density=[0.5, 0.7, 0.3]),
            "parameters": {"gamma": 0.05, "lambda": 0.9},
        }
        for name in ("breadcrumbs", "breadcrumbs_ties")
    },
    "sce": {
        "merge_method": "sce",
        "base_model": "base",
        "models": [{"model": name} for name in ALL],
        "parameters": {"select_topk": 0.3},
    },
    "ram": {
        "merge_method": "ram",
        "base_model": "base",
        "models": [{"model": name} for name in ALL],
        "parameters": {"epsilon": 0.005},
    },
    "ramplus_tl": {
        "merge_method": "ramplus_tl",
        "base_model": "base",
        "models": [{"model": name} for name in ALL],
        "parameters": {"epsilon": 0.005, "r": 0.3, "alpha": 0.4},
    },
    **{
        f"model_stock, filter_wise {wise}".lower(): {
            "merge_method": "model_stock",
            "base_model": "base",
            "models": [{"model": name} for name in ALL],
            "parameters": {"filter_wise": wise},
        }
        for wise in (False, True)
    },
    **{
        f"nuslerp, {label}": {
            "merge_method": "nuslerp",
            **({"base_model": "base"} if "task" in label else {}),
            "models": weighted(["a", "b"], weight=[0.7, 0.3]),
            "parameters": parameters,
        }
        for label, parameters in {
            "flat": {},
            "task vectors": {},
            "rows": {"nuslerp_flatten": False},
            "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        }.items()
    },
    "multislerp": {"merge_method": "multislerp", "models": weighted(ALL, weight=WEIGHTS)},
    "multislerp, task vectors": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": weighted(ALL, weight=WEIGHTS),
    },
    "karcher": {"merge_method": "karcher", "models": [{"model": name} for name in ALL]},
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"t": 0.005},
    },
    "arcee_fusion": {
        "merge_method": "arcee_fusion",
        "base_model": "base",
        "models": [{"model": "a"}],
    },
    "della, density 1": {
        "merge_method": "della",
        "base_model": "base",
        "models": weighted(ALL, weight=WEIGHTS),
    },
    "three stages": [
        {"name": "first", "merge_method": "linear", "models": weighted(["a", "b"], weight=WEIGHTS)},
        {
            "name": "second",
            "merge_method": "slerp",
            "base_model": "first",
            "models": [{"model": "c"}],
            "parameters": {"t": [0.1, 0.5, 0.9]},
        },
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": weighted(["second", "c"], weight=WEIGHTS, density=[0.5, 0.6]),
        },
    ],
    "modules": {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {
                "slices": [
                    {
                        "sources": [
                            {"model": "eyes", "layer_range": [0, 2], "parameters": {"weight": 0.3}},
                            {
                                "model": "sight",
                                "layer_range": [0, 2],
                                "parameters": {"weight": 0.7},
                            },
                        ]
                    },
                    {
                        "sources": [
                            {"model": "eyes", "layer_range": [1, 4]},
                            {"model": "sight", "layer_range": [1, 4]},
                        ]
                    },
                ],
                "parameters": {"weight": 0.5},
            },
            "vision_tower": {
                "models": [
                    {"model": "eyes", "parameters": {"weight": [0.1, 0.9]}},
                    {"model": "sight", "parameters": {"weight": 0.4}},
                ],
            },
            "multi_modal_projector": {"models": weighted(["sight"], weight=[1.0])},
        },
    },
}


def make_family(folder: Path) -> None:
    """A tiny Llama in float32 with tied embeddings, and three fine-tunes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    start = {name: value.clone() for name, value in base.state_dict().items()}
    for name in ALL:
        changed = {k: v + torch.randn_like(v) * 0.01 for k, v in start.items()}
        changed["lm_head.weight"] = changed["model.embed_tokens.weight"]
        base.load_state_dict(changed)
        base.save_pretrained(folder / name)


def make_eyes(folder: Path) -> None:
    """Two tiny models that see: Mistral 3's text, vision and projector, in float32."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {
        "model_type": "mistral",
        "num_hidden_layers": 4,
        "vocab_size": 64,
        "head_dim": 8,
        "num_key_value_heads": 2,
    }
    vision = {"model_type": "pixtral", "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    config = Mistral3Config(
        text_config={**sizes, **text}, vision_config={**sizes, **vision}, tie_word_embeddings=False
    )
    model = Mistral3ForConditionalGeneration(config)
    for name in EYES:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * 0.01
        model.save_pretrained(folder / name)


def with_absolute_paths(value: Any, folder: Path) -> Any:
    """The recipe with absolute model paths: mergekit takes relative ones for Hub ids, late."""
    if isinstance(value, dict):
        return {k: with_absolute_paths(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [with_absolute_paths(v, folder) for v in value]
    return str(folder / value) if value in ("base", *ALL, *EYES) else value


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def run(command: list[str], cwd: Path) -> None:
    # mergekit asks the Hub about local folders; this way it takes no for an answer at once.
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """A row's figures: same names, largest difference in units in the last place, share equal."""
    if ours.keys() != theirs.keys():
        return f"names differ: {sorted(ours.keys() ^ theirs.keys())} | |"
    worst, equal, count = 0.0, 0, 0
    for name, mine in ours.items():
        other = theirs[name]
        # Of the tensor's largest weight: where sources cancel, an element's own last place is finer
        # than any float32 sum of them can be.
        largest = other.abs().max()
        step = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
        worst = max(worst, float((mine - other).abs().max() / step))
        equal += int((mine == other).sum())
        count += mine.numel()
    return f"{worst:.2g} | {equal / count:.2%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mergekit", type=Path, required=True, help="its mergekit-yaml")
    given = parser.parse_args()
    mergekit = str(given.mergekit.absolute())
    print("| recipe | largest difference, units in the last place | same bits |")
    print("|---|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_family(folder)
        make_eyes(folder)
        for label, recipe in CASES.items():
            slug = "".join(c if c.isalnum() else "-" for c in label)
            path = folder / f"{slug}.yaml"
            documents = recipe if isinstance(recipe, list) else [recipe]
            whole = [with_absolute_paths({**one, "dtype": "float32"}, folder) for one in documents]
            path.write_text(yaml.safe_dump_all(whole, sort_keys=False))
            run([sys.executable, "-m", "merge_cli", "run", str(path), f"{slug}-ours"], folder)
            command = [mergekit, str(path), f"{slug}-theirs"]
            if len(documents) > 1:
                stages = ["--intermediate-dir", str(folder / f"{slug}-stages")]
                multi = str(Path(mergekit).with_name("mergekit-multi"))
                command = [multi, str(path), "--out-path", command[-1], *stages]
            run(command, folder)
            ours, theirs = tensors(folder / f"{slug}-ours"), tensors(folder / f"{slug}-theirs")
            print(f"| {label} | {compare(ours, theirs)}", flush=True)


if __name__ == "__main__":
    main()
