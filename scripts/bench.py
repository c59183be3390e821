"""As fast as the disk? Merges against the floor of reading and writing their bytes, in one run.

    python scripts/bench.py --size 0.5B --methods soup,ties         # ours over the floor
    python scripts/bench.py --size 1.5B --against ../other-checkout  # A/B of two checkouts
    python scripts/bench.py --size 0.5B --mergekit venv/bin/mergekit-yaml --cache both
    python scripts/bench.py --stats                                 # what statistics cost
    python scripts/bench.py --plan                                  # planning 100,000 tensors

The floor of a merge is `python -c "import torch"` in a process of its own, plus each of its input
bytes read once and as many bytes written as it writes (bench_floor.py), with as many threads, on
the same disk. Every process is measured whole: wall time, CPU time, peak memory. Contenders take
turns within a round, in the opposite order every second round, so that drift cancels; ratios are
taken round by round, and their median is reported beside the median, least and largest of times.
CPU seconds (user and system) say more than wall time on a machine with other work.
After each process its output is deleted and the disk synced, outside the timed part.

Warm: the inputs were read just before. Cold: they are dropped from the page cache before each
measurement, the floor's too (Python's and torch's own files stay cached). Unmeasured, each
contender first merges a tiny family by the method, so that byte code and kernels are compiled.

Families are made by synthetic.py under --work and stay there for the next time. Progress goes to
stderr, the Markdown table to stdout. Exit code 1: something failed and its row is incomplete.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench_plan import measure_plans, plan_settings, plan_table
from bench_process import BenchError, command_of
from bench_recipes import METHODS
from bench_report import MERGEKIT, OURS, machine, machine_line, stage_table, table, usable_cores
from bench_rounds import Bench, Contender, say
from synthetic import SIZES, Settings, family_bytes, is_made, parameter_count

SCRIPTS = Path(__file__).resolve().parent
NO_STATS, BASELINE = "no-stats", "baseline"


def make_contenders(given: argparse.Namespace) -> list[Contender]:
    """Ours first; then those that it is compared with."""
    common = ["-q", *shlex.split(given.flags)]
    if given.threads:
        common += ["--threads", str(given.threads)]
    if given.max_memory:
        common += ["--max-memory", given.max_memory]
    command, env = command_of(given.ours)
    found = [Contender(OURS, command, env, common, given.rounds)]
    if given.stats:
        flags = [*common, "--no-stats"]
        found.append(Contender(NO_STATS, command, env, flags, given.rounds))
    if given.against:
        other, other_env = command_of(given.against)
        found.append(Contender(BASELINE, other, other_env, common, given.rounds))
    if given.mergekit:
        other, other_env = command_of(given.mergekit)
        flags = ["--lazy-unpickle", *(["-j", str(given.threads)] if given.threads else [])]
        found.append(Contender(MERGEKIT, other, other_env, flags, given.mergekit_rounds))
    return found


def prepare_family(work: Path, name: str, settings: Settings, outputs: int = 0) -> Path:
    """The family's folder under `work`, made where it is missing; there is room for it first."""
    folder = work / name
    missing = 0 if is_made(folder, settings) else family_bytes(settings)
    free = shutil.disk_usage(work).free
    needs = f"{missing / 1e9:.1f} GB for the family {name}, {outputs / 1e9:.1f} GB for outputs"
    say(f"{work}: needs {needs}; {free / 1e9:.1f} GB are free")
    if missing + outputs > free:
        raise SystemExit("not enough room: free some, or choose another --work")
    if missing or not folder.exists():
        # In a process of its own: numpy would stay in this one, and in its children's peaks.
        program = (
            "import json, sys; from pathlib import Path; import synthetic as s;"
            "v = json.loads(sys.argv[2]); v['size'] = s.Size(**v['size']);"
            "s.make_family(Path(sys.argv[1]), s.Settings(**v))"
        )
        command = [sys.executable, "-c", program, str(folder), json.dumps(asdict(settings))]
        subprocess.run(command, check=True, cwd=SCRIPTS)
        os.sync()
    return folder


def family_settings(given: argparse.Namespace) -> tuple[str, Settings]:
    """The family that was asked for, and a name for its folder."""
    size = SIZES[given.size]
    name = f"{given.size}-{given.sources}"
    if given.layers:
        size = replace(size, layers=given.layers)
        name += f"-layers{given.layers}"
    if given.shards:
        name += f"-shards{given.shards}"
    return name, Settings(size, given.sources, given.shards)


def run_merges(given: argparse.Namespace, bench: Bench, document: dict[str, Any]) -> str:
    """Everything but --plan; fills `document` and returns the Markdown."""
    if given.family:
        family = given.family.absolute()
    else:
        name, settings = family_settings(given)
        output = 2 * parameter_count(settings.size)
        family = prepare_family(bench.work, name, settings, output)
        document["family"] = asdict(settings)
    document["family_folder"] = str(family)
    if not given.no_warm_up:
        tiny = prepare_family(bench.work, "tiny-3", Settings(SIZES["tiny"]))
        bench.warm_up(tiny, given.methods)
    rows = document["results"] = []
    for method in given.methods:
        for cache in ("warm", "cold") if given.cache == "both" else (given.cache,):
            rows.append(bench.row(method, family, cache, given.rounds))
            save(given.json, document)  # what is measured is kept, whatever comes
    stages = stage_table(rows)
    return table(rows) + (
        f"\n\nStages, medians from merge_report.json:\n\n{stages}" if stages else ""
    )


def run_plans(given: argparse.Namespace, bench: Bench, document: dict[str, Any]) -> str:
    """--plan; fills `document` and returns the Markdown."""
    settings = plan_settings(given.plan_tensors, given.shards)
    family = prepare_family(bench.work, f"plan-{given.plan_tensors}-{given.shards}", settings)
    document["family"] = asdict(settings)
    contenders = [c for c in bench.contenders if c.name not in (MERGEKIT, NO_STATS)]
    rounds = measure_plans(contenders, family, bench.folder, given.methods[0], given.rounds)
    document["results"] = rounds
    return plan_table(rounds)


def save(path: Path | None, document: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def shortened(note: str) -> str:
    """Its first and last lines: the whole is in the JSON and was on stderr."""
    lines = note.strip().splitlines()
    return lines[0] + (f" ... {lines[-1]}" if len(lines) > 1 else "")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="0.5B")
    add("--layers", type=int, help="instead of the size's own number")
    add("--shards", type=int, default=0, help="files of each model (default: 5 GB each)")
    add("--sources", type=int, default=3, help="fine-tunes beside the base")
    add("--family", type=Path, help="an existing folder of base, model0, model1, ...")
    add("--methods", type=method_list, default=list(METHODS), help=",".join(METHODS))
    add("--cache", choices=["warm", "cold", "both"], default="warm")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, help="of the merge and of the floor")
    add("--max-memory", help="passed on")
    add("--flags", default="", help='more flags for merge-cli, as in --flags "--no-stats"')
    add("--ours", default=str(SCRIPTS.parent), help="what is measured (default: this checkout)")
    add("--against", help="another merge-cli: a checkout, a Python or a command")
    add("--mergekit", help="a mergekit-yaml of mergekit 0.1.5")
    add("--mergekit-rounds", type=int, default=1)
    add("--stats", action="store_true", help="also without statistics, and the ratio")
    add("--plan", action="store_true", help="time planning instead (the first of --methods)")
    add("--plan-tensors", type=int, default=100_000)
    add("--no-warm-up", action="store_true", help="do not merge a tiny family first")
    add("--work", type=Path, default=Path("out/bench"), help="families and outputs go here")
    add("--json", type=Path, help="every raw measurement")
    add("--markdown", type=Path, help="the table, as on stdout")
    # argparse takes a lone "--no-stats" after --flags for an option of its own.
    at = arguments.index("--flags") if "--flags" in arguments else len(arguments)
    if at + 1 < len(arguments):
        arguments = [*arguments[:at], f"--flags={arguments[at + 1]}", *arguments[at + 2 :]]
    return parser.parse_args(arguments)


def method_list(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"no such method: {', '.join(unknown)}")
    return names


def main() -> None:
    given = parse_arguments(sys.argv[1:])
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, given.threads or usable_cores(), make_contenders(given))
    found = machine(work, Path(given.ours))
    document: dict[str, Any] = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": found,
        "threads": bench.threads,
        "notes": bench.notes,
    }
    try:
        text = (
            run_plans(given, bench, document) if given.plan else run_merges(given, bench, document)
        )
    except BenchError as error:
        raise SystemExit(str(error)) from None
    finally:
        shutil.rmtree(bench.folder, ignore_errors=True)
    head = f"`{shlex.join(['python', 'scripts/bench.py', *sys.argv[1:]])}`\n\n{machine_line(found)}"
    markdown = "\n\n".join([head, text, *(f"Note: {shortened(note)}" for note in bench.notes)])
    save(given.json, document)
    print(markdown)
    if given.markdown:
        given.markdown.write_text(markdown + "\n")
    if any(" failed: " in note for note in bench.notes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
