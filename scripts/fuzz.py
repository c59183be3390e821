"""Mutated inputs: nothing but a sentence, nothing that hangs, nothing corrupt that succeeds.

    python scripts/fuzz.py                        # three minutes
    python scripts/fuzz.py --minutes 480 --seed 7 --only header recipe --keep found/

Every case is a copy of a few tiny inputs with one file mutated, planned and merged in this process.
Accepted is an exception of `merge_cli.errors`, or a success whose output is what its inputs say:
for weights and indexes the mean of what the safetensors library reads. Anything else is a finding,
printed once for each place in the code: another exception, more than five seconds of processor
time, an output that is wrong. The seed and the case's number make it again.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from fuzzing.models import write_inputs
from fuzzing.targets import TARGETS, Target, Wrong

from merge_cli.errors import MergeCliError

SECONDS = 5.0
MEMORY = 8 * 2**30  # of address space beyond what the libraries take


class Hang(BaseException):
    """A case that took too long. No Exception, so that nothing on its way catches it."""


def main() -> int:
    arguments = _arguments()
    chosen = [t for t in TARGETS if not arguments.only or t.name in arguments.only]
    counts: Counter[tuple[str, str]] = Counter()
    findings: dict[str, str] = {}
    signal.signal(signal.SIGPROF, _hang)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "inputs").mkdir()
        write_inputs(root / "inputs")
        for target in chosen:  # imports and compilation belong to no case
            _try(target, root, 0, lambda root, draw: None)
        resource.setrlimit(resource.RLIMIT_AS, (_memory() + MEMORY, resource.RLIM_INFINITY))
        end = time.monotonic() + 60 * arguments.minutes
        number = arguments.first
        while time.monotonic() < end and number != arguments.last:
            number += 1
            target = chosen[number % len(chosen)]
            outcome, finding = _try(
                target,
                root,
                f"{arguments.seed} {number}",
                target.change,
                Path(arguments.keep) if arguments.keep else None,
            )
            counts[target.name, outcome] += 1
            kind = finding.partition(":")[0] + finding.partition("\n")[2]  # whatever it says there
            if finding and kind not in findings:
                findings[kind] = f"{target.name}, --seed {arguments.seed} --case {number}"
                print(f"FOUND {findings[kind]}\n{finding}\n", flush=True)
    _show(counts, findings)
    return 1 if findings else 0


def _try(
    target: Target, root: Path, seed: Any, change: Any, keep: Path | None = None
) -> tuple[str, str]:
    """One case: its outcome in a word, and what was found."""
    draw = random.Random(f"{seed} {target.name}")
    folder = Path(tempfile.mkdtemp(dir=root))
    shutil.copytree(root / "inputs", folder, dirs_exist_ok=True)
    finding = ""
    try:
        change(folder, draw)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            target.use(folder, draw)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        outcome = "accepted"
    except MergeCliError as error:
        outcome = "refused"
        if not error.args or len(str(error)) > 20_000:
            finding = f"a message of {len(str(error))} characters: {type(error).__name__}"
    except Wrong as error:
        outcome, finding = "WRONG", f"Wrong: {error}"
    except Hang:
        outcome, finding = "HANG", _place("more than five seconds")
    except Exception as error:  # whatever it is, it is what is looked for
        outcome, finding = "TRACEBACK", _place(f"{type(error).__name__}: {str(error)[:200]}")
    if finding and keep is not None:
        kept = keep / f"{target.name} {seed}".replace(" ", "-")
        shutil.copytree(folder, kept, dirs_exist_ok=True, symlinks=True)
    shutil.rmtree(folder, ignore_errors=True)
    return outcome, finding


def _place(what: str) -> str:
    """An exception by the last lines of this project that it went through."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [frame for frame in frames if "merge_cli" in frame.filename] or frames
    lines = [f"  {Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in own[-3:]]
    return "\n".join([what.partition("\n")[0], *lines])


def _hang(*_: Any) -> None:
    raise Hang


def _memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _show(counts: Counter[tuple[str, str]], findings: dict[str, str]) -> None:
    outcomes = ("refused", "accepted", "WRONG", "HANG", "TRACEBACK")
    print(f"{'inputs':<16}{'all':>8}" + "".join(f"{word:>11}" for word in outcomes))
    names = sorted({name for name, _ in counts})
    for name in names:
        row = [counts[name, word] for word in outcomes]
        print(f"{name:<16}{sum(row):>8}" + "".join(f"{count:>11}" for count in row))
    print(f"{'all':<16}{sum(counts.values()):>8}; {len(findings)} kinds of findings")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[t.name for t in TARGETS], default=[])
    parser.add_argument("--case", type=int, help="this one alone, with the same --only")
    parser.add_argument("--keep", help="a folder for the inputs of what is found")
    arguments = parser.parse_args()
    arguments.first = arguments.case - 1 if arguments.case else 0
    arguments.last = arguments.case if arguments.case else -1
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
