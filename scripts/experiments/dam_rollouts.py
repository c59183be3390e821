"""Learning on-policy beside the default, at equal tokens, on the zoo: losses and exact answers.

    python scripts/experiments/dam_rollouts.py            three seeds of the default and of rollouts
    python scripts/experiments/dam_rollouts.py --seeds 0  one of them

Both start as the default does, at the best merge that needs no training. With rollouts fewer tokens
of the data are trained on, so that with the sampled ones (and the prefixes before them) there are
as many in all; sampling and judging are forward passes and count in CPU seconds alone. Teachers'
predictions are cached by the first run. Exact answers are to maths problems of the test rows,
decoded greedily. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import yaml
from family import BASE, DATA, ROOT, WORK

import merge_cli

DOMAINS = ("japanese", "math", "code")
TOKENS = 32_768
ROWS, SAMPLED = 6, 48  # rows of a step, and tokens of each continuation with its prefix, at most
EVALUATION = [
    *({"task": "loss", "name": name, "data": str(DATA / f"{name}.test.jsonl")} for name in DOMAINS),
    {"task": "exact_match", "name": "answers", "data": str(DATA / "math.test.jsonl"), "limit": 200,
     "extract": r"Answer: (-?\d+)", "take": "last", "max_new_tokens": 48},
]  # fmt: skip


def variants(step_tokens: float) -> dict[str, dict[str, Any]]:
    """Options by name; `step_tokens` of the data are in a step of the default."""
    share = step_tokens / (step_tokens + ROWS * SAMPLED)
    return {
        f"rollouts, weight {weight:g}": {
            "tokens": round(TOKENS * share),
            "rollouts": {"weight": weight},
        }
        for weight in (1.0, 0.3)
    }


def run(name: str, training: dict[str, Any], seed: int) -> dict[str, Any]:
    """One merge, and what it is worth."""
    folder = WORK / "dam_rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    data = {n: {"files": str(DATA / f"{n}.train.jsonl")} for n in DOMAINS}
    for n in DOMAINS:
        data[n]["held_out"] = str(DATA / f"{n}.val.jsonl")
    document = {
        "merge_method": "dam",
        "base_model": str(BASE),
        "models": [{"model": str(ROOT / "zoo" / n), "data": data[n]} for n in DOMAINS],
        "training": training,
        "dtype": "float32",
        "seed": seed,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))
    began = time.process_time()
    options = merge_cli.MergeOptions(device="cpu", threads=1, overwrite=True)
    out = folder / f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
    result = merge_cli.merge(recipe, out, options=options)
    spent = time.process_time() - began
    about = result.report["training"]
    tasks_file = folder / "eval.yaml"
    tasks_file.write_text(yaml.safe_dump({"tasks": EVALUATION}))
    tasks = merge_cli.evaluate(result.path, str(tasks_file)).tasks
    return {
        **{n: tasks[n].value for n in DOMAINS},
        "answers": tasks["answers"].value,
        "kl": about["test_scores"]["dam"]["mean_kl"],
        "tokens": about["cost"]["tokens"],
        "steps": about["steps"],
        "best": about["best_step"],
        "seconds": spent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    heads = (*DOMAINS, "mean loss", "test KL", "answers", "tokens", "steps", "best step", "CPU s")
    print("| merge | seed | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * (len(heads) + 1))
    for seed in options.seeds:
        default = run("default", {"tokens": TOKENS}, seed)
        show("default", seed, default)
        for name, training in variants(default["tokens"] / default["steps"]).items():
            show(name, seed, run(name, training, seed))


def show(name: str, seed: int, found: dict[str, Any]) -> None:
    losses = [found[domain] for domain in DOMAINS]
    cells = [f"{loss:.3f}" for loss in (*losses, statistics.mean(losses))]
    cells += [f"{found['kl']:.4f}", f"{found['answers']:.3f}", f"{found['tokens']:,}"]
    cells += [f"{found['steps']}", f"{found['best']}", f"{found['seconds']:.0f}"]
    print(f"| {name} | {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
