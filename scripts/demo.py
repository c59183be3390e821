"""make demo: merges a family of small real models three ways and measures what came out.

    python scripts/demo.py [--out out/demo]

1. merges zoo/japanese, zoo/math and zoo/code by configs/demo/*.yaml       seconds
2. scores base, experts and merges on held-out text                        about a minute
3. prints the table and where the reports are
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = ("japanese", "math", "code")
RECIPES = ("soup", "ties", "dare")


def merge(recipe: Path, out: Path, console: Console) -> None:
    """What a user would type, shown as such."""
    shown = [os.path.relpath(path) for path in (recipe, out)]
    console.print(f"\n[bold]$ merge-cli run {' '.join(shown)} --overwrite[/bold]")
    command = [sys.executable, "-m", "merge_cli", "run", *shown, "--overwrite"]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def scores(models: dict[str, Path], console: Console) -> dict[tuple[str, str], float]:
    """Held-out nats per token of every model on every expert's domain."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    import merge_cli

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pairs = [(name, domain) for name in models for domain in EXPERTS]
    found = {}
    for name, domain in track(pairs, "scoring on held-out text", console=console, transient=True):
        data = ROOT / "zoo" / "data" / f"{domain}.test.jsonl"
        found[name, domain] = merge_cli.evaluate(models[name], data)[domain].value
    return found


def table(models: dict[str, Path], found: dict[tuple[str, str], float]) -> Table:
    """One row for each model; the mean says how good a model is at everything at once."""
    view = Table(
        box=None,
        header_style="bold",
        title_justify="left",
        title="Held-out loss, nats per token (lower is better)",
    )
    view.add_column("model")
    for domain in (*EXPERTS, "mean"):
        view.add_column(domain, justify="right")
    rows = {name: [found[name, domain] for domain in EXPERTS] for name in models}
    for values in rows.values():
        values.append(sum(values) / len(values))
    best = [min(column) for column in zip(*rows.values(), strict=True)]
    for name, values in rows.items():
        cells = [
            f"[bold green]{v:.3f}[/bold green]" if v == least else f"{v:.3f}"
            for v, least in zip(values, best, strict=True)
        ]
        view.add_row(name, *cells, end_section=name in ("base", EXPERTS[-1]))
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    out = parser.parse_args().out
    console = Console()
    console.print(
        "A base language model of 5 million parameters and three experts fine-tuned from it "
        "(zoo/README.md), merged three ways."
    )
    out.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        merge(ROOT / "configs" / "demo" / f"{name}.yaml", out / name, console)
    models = {name: ROOT / "zoo" / name for name in ("base", *EXPERTS)}
    models |= {f"merged by {name}": out / name for name in RECIPES}
    console.print()
    found = scores(models, console)
    console.print(table(models, found))
    console.print(
        "\nEach expert is best at its own subject and pays for it at the others. A merge is one "
        "model for all three: compare its mean with the base's and the experts'."
    )
    console.print("\nOpen a report in a browser:")
    for name in RECIPES:
        console.print(f"  {os.path.relpath(out / name / 'merge_report.html')}", soft_wrap=True)
    console.print("\nWhat next: merge-cli methods, configs/, README.md.")


if __name__ == "__main__":
    main()
