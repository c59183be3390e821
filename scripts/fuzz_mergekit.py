"""Random recipes through mergekit 0.1.5 and merge-cli, in one process: where do they differ?

    python -m venv .venv-mergekit && .venv-mergekit/bin/pip install mergekit==0.1.5 -e .
    .venv-mergekit/bin/python scripts/fuzz_mergekit.py --recipes 500

Makes tiny Llamas (float32, and one in bfloat16), writes recipes over all of mergekit's methods with
what its grammar has (gradients, filters, slices, unlisted bases, parameters that a method does not
read, booleans as numbers), merges each with both, and counts the outcomes by cause. DARE and DELLA
stand at density 1, since below it they draw at random.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import re
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # mergekit asks the Hub about local folders

import torch
import yaml
from safetensors.torch import load_file, save_file

LAYERS, ULPS = 3, 16
MODELS = ("base", "a", "b", "c", "half")
GROUPS = {
    "task": (
        "task_arithmetic",
        "ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
    ),
    "based": ("model_stock", "sce", "ram", "ramplus_tl"),
    "pair": ("slerp", "nearswap", "arcee_fusion"),
    "average": ("linear", "karcher", "multislerp", "nuslerp"),
    "one": ("passthrough",),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
PER_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
SHARED = (
    "normalize",
    "rescale",
    "lambda",
    "int8_mask",
    "t",
    "select_topk",
    "filter_wise",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "normalize_weights",
    "max_iter",
    "r",
    "alpha",
)
TRUTH = (
    "normalize",
    "rescale",
    "int8_mask",
    "filter_wise",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "normalize_weights",
)
FILTERS = ("self_attn", "mlp", "layers.1.", "layers.0.", "norm", "lm_head", "embed", "q_proj")


def make_models(folder: Path) -> None:
    """A base and three fine-tunes; one more in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for name in MODELS:
        kind = torch.bfloat16 if name == "half" else torch.float32
        noise = 0.0 if name == "base" else 0.02
        changed = {k: (v + torch.randn_like(v) * noise).to(kind) for k, v in start.items()}
        (folder / name).mkdir()
        save_file(changed, folder / name / "model.safetensors", metadata={"format": "pt"})
        config.dtype = kind
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)


class Recipes:
    """Random recipes from one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._random, self._folder = random.Random(seed), folder

    def __call__(self) -> dict[str, Any]:
        pick = self._random
        group = pick.choice(tuple(GROUPS))
        method = pick.choice(GROUPS[group])
        recipe: dict[str, Any] = {"merge_method": method}
        names = pick.sample(MODELS[1:4], 3)
        if pick.random() < 0.15:
            names[0] = "half"
        count = {"pair": 1, "one": 1}.get(group, pick.randint(1, 3))
        if method == "nuslerp":
            count = 2
        chosen = names[:count]
        if group in ("task", "based", "pair") or pick.random() < 0.4:
            recipe["base_model"] = self._path("base")
            if pick.random() < 0.5 and group != "one":
                chosen.insert(pick.randint(0, len(chosen)), "base")
        sliced = pick.random() < 0.35
        if sliced:
            if "base_model" in recipe and "base" not in chosen:
                chosen.append("base")
            recipe["slices"] = [self._slice(method, chosen) for _ in range(pick.randint(1, 3))]
        else:
            recipe["models"] = [self._source(method, name) for name in chosen]
        shared = self._shared(method)
        if shared:
            recipe["parameters"] = shared
        if pick.random() < 0.5:
            recipe["dtype"] = pick.choice(("float32", "float32", "bfloat16"))
        if pick.random() < 0.1:
            recipe["out_dtype"] = "float16"
        if pick.random() < 0.05:
            recipe["random_seed"] = 0
        return recipe

    def _path(self, name: str) -> str:
        return str(self._folder / name)

    def _source(self, method: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self._path(name)}
        own = {}
        if self._random.random() < 0.85:
            own["weight"] = self._setting("weight", method)
        for extra in ("density", "gamma", "epsilon", "scale"):
            if self._random.random() < 0.25:
                own[extra] = self._setting(extra, method)
        if self._random.random() < 0.1:
            stray = self._random.choice(SHARED)
            own[stray] = self._setting(stray, method)
        if own:
            found["parameters"] = own
        return found

    def _slice(self, method: str, names: list[str]) -> dict[str, Any]:
        length = self._random.randint(1, LAYERS)
        sources = []
        for name in names:
            start = self._random.randint(0, LAYERS - length)
            source = self._source(method, name)
            sources.append({**source, "layer_range": [start, start + length]})
        found: dict[str, Any] = {"sources": sources}
        if self._random.random() < 0.3:
            found["parameters"] = self._shared(method)
        return found

    def _shared(self, method: str) -> dict[str, Any]:
        names = [name for name in (*SHARED, *PER_MODEL) if self._random.random() < 0.18]
        if method in ("slerp", "nearswap"):
            names.append("t")
        if self._random.random() < 0.3:
            names.append("weight")
        return {name: self._setting(name, method) for name in names}

    def _setting(self, name: str, method: str) -> Any:
        kind = self._random.random()
        if kind < 0.6:
            return self._scalar(name, method)
        if kind < 0.75:
            return [self._scalar(name, method) for _ in range(self._random.randint(1, 4))]
        rules: list[dict[str, Any]] = [
            {"filter": self._random.choice(FILTERS), "value": self._value(name, method)}
            for _ in range(self._random.randint(1, 2))
        ]
        return [*rules, {"value": self._value(name, method)}]

    def _value(self, name: str, method: str) -> Any:
        if self._random.random() < 0.3:
            return [self._scalar(name, method) for _ in range(self._random.randint(1, 3))]
        return self._scalar(name, method)

    def _scalar(self, name: str, method: str) -> Any:
        pick = self._random
        if name in TRUTH:
            return pick.choice((True, False, 1, 0, 1.0, 0.0))
        if name == "max_iter":
            return pick.choice((0, 1, 5, 10))
        if name == "density":
            low = (1, 1.0, 1.2) if method in RANDOM else (0, 0.001, 0.3, 0.5, 0.9, 1, 1.5)
            return pick.choice(low)
        if name == "t" and method == "nearswap":
            return pick.choice((0, 0.001, 0.01, 1))
        if name == "t":
            return pick.choice((0, 0.25, 0.5, 1, 1.2))
        if name in ("gamma", "r", "alpha", "select_topk", "epsilon"):
            return pick.choice((0, 0.01, 0.1, 0.3))
        return pick.choice((0, 0.3, 0.5, 1, 1.0, -0.5, 2))


def theirs(recipe: dict[str, Any], out: Path) -> str:
    """Merge with mergekit; why not, empty when it does."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    except Exception as error:  # whatever it raises is its answer
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def ours(recipe: dict[str, Any], file: Path, out: Path) -> str:
    """Merge with merge-cli; why not, empty when it does. What is no refusal is raised."""
    import merge_cli
    from merge_cli.errors import MergeCliError
    from merge_cli.options import MergeOptions

    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    options = MergeOptions(device="cpu", threads=1, statistics=False)
    try:
        merge_cli.merge(file, out, options=options)
    except MergeCliError as error:
        problems = getattr(error, "problems", None)
        return problems[0].message if problems else error.message
    return ""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def compared(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    """`same bits`, `within rounding`, or how they differ."""
    if mine.keys() != other.keys():
        return "names differ"
    worst, off, count = 0.0, 0, 0
    for name, a in mine.items():
        b = other[name]
        if a.dtype != b.dtype:
            return f"dtype {a.dtype} for {b.dtype}"
        if a.shape != b.shape:
            return "shapes differ"
        if not torch.isfinite(b).all():
            return "theirs is not finite"
        largest = b.abs().max().float()
        step = float(largest) * torch.finfo(b.dtype).eps or 1e-30
        apart = (a.float() - b.float()).abs() / step
        worst = max(worst, float(apart.max()))
        off, count = off + int((apart > ULPS).sum()), count + apart.numel()
    if worst == 0:
        return "same bits"
    if worst <= ULPS:
        return f"within rounding ({ULPS} units in the last place)"
    few = off < 0.01 * count
    return "under 1% of elements differ, at a threshold" if few else "values differ"


def cause(message: str) -> str:
    """A refusal without the names and numbers of this recipe."""
    text = re.sub(r"/\S+/", "", message).partition(" for ")[0]
    return re.sub(r"\[[^\]]*\]|-?\d+(\.\d+)?(e-?\d+)?", "N", text)[:90]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the recipes that differ")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        recipes = Recipes(given.seed, folder)
        for number in range(given.recipes):
            recipe = recipes()
            left, right = folder / "ours", folder / "theirs"
            refused, failed = ours(recipe, folder / "r.yaml", left), theirs(recipe, right)
            if refused and failed:
                outcome = "refused by both"
            elif refused:
                made = tensors(right).values()
                finite = all(bool(torch.isfinite(value).all()) for value in made)
                result = "" if finite else " (mergekit: not finite)"
                outcome = f"refused here alone: {recipe['merge_method']}: {cause(refused)}{result}"
            elif failed:
                outcome = f"refused by mergekit alone: {cause(failed)}"
            else:
                outcome = compared(tensors(left), tensors(right))
                if not outcome.startswith(("same bits", "within rounding")):
                    half = "half" in str(recipe) or "16" in str(recipe)
                    where = ", with 16-bit formats" if half else ""
                    outcome = f"{outcome}: {recipe['merge_method']}{where}"
            counts[outcome] += 1
            if given.keep and (any(word in outcome for word in ("differ", "dtype", "here"))):
                given.keep.mkdir(parents=True, exist_ok=True)
                text = yaml.safe_dump(recipe, sort_keys=False).replace(f"{folder}/", "./")
                (given.keep / f"{number}.yaml").write_text(f"# {outcome}\n{text}")
            for place in (left, right):
                shutil.rmtree(place, ignore_errors=True)
    print("| outcome | recipes |\n|---|---:|")
    for outcome, count in counts.most_common():
        print(f"| {outcome} | {count} |")


if __name__ == "__main__":
    main()
