"""How long the command line takes to begin, in CPU seconds, against what it cannot do without.

    python scripts/bench_start.py FOLDER --rounds 9 [--against OTHER_CHECKOUT]

`--help` against the help of a minimal typer program; a soup of the 20M family against
`import numpy, numba` (user seconds); and the first merge, with an empty folder for compiled loops.
Processes take turns; medians, after a round that fills the caches. A round takes about six seconds
of CPU time for each checkout.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_process import command_of
from bench_recipes import METHODS, write_recipe
from synthetic import SIZES, Settings, make_family

_MINIMAL = '''import typer
app = typer.Typer()
@app.command()
def first(path: str, number: int = 1):
    """Do something."""
@app.command()
def second(path: str):
    """Do something else."""
app()
'''


def cpu(command: list[str], env: dict[str, str], cwd: Path) -> tuple[float, float]:
    """User and system seconds of a command.

    Raises:
        SystemExit: it failed.
    """
    pid = os.fork()
    if pid == 0:
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execve(command[0], command, env)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_utime, usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", help="another checkout")
    given = parser.parse_args()
    make_family(given.folder / "20M", Settings(SIZES["20M"]))
    work = Path(tempfile.mkdtemp(dir=given.folder)).absolute()
    (work / "minimal.py").write_text(_MINIMAL)
    write_recipe(work / "recipe.yaml", (given.folder / "20M").absolute(), METHODS["soup"])
    checkouts = {"ours": str(Path(__file__).resolve().parent.parent)}
    checkouts |= {"other": given.against} if given.against else {}
    helps: dict[str, list[float]] = {name: [] for name in ("minimal", *checkouts)}
    merges: dict[str, list[float]] = {name: [] for name in ("imports", *checkouts)}
    for number in range(given.rounds + 1):
        print(f"round {number} of {given.rounds}", file=sys.stderr)
        env = command_of(checkouts["ours"])[1]
        one = {"minimal": sum(cpu([sys.executable, "minimal.py", "--help"], env, work))}
        two = {"imports": cpu([sys.executable, "-c", "import numpy, numba"], env, work)[0]}
        for name, checkout in checkouts.items():
            command, env = command_of(checkout)
            one[name] = sum(cpu([*command, "--help"], env, work))
            shutil.rmtree(work / "out", ignore_errors=True)
            two[name] = cpu([*command, "run", "recipe.yaml", "out", "-q"], env, work)[0]
        for name, value in one.items() if number else ():  # the first round fills caches
            helps[name].append(value)
        for name, value in two.items() if number else ():
            merges[name].append(value)
    plain, imports = median(helps.pop("minimal")), median(merges.pop("imports"))
    print(f"minimal --help {plain:.3f} s; import numpy, numba {imports:.3f} s user")
    for name, checkout in checkouts.items():
        shutil.rmtree(work / "out", ignore_errors=True)
        command, env = command_of(checkout)
        env = env | {"NUMBA_CACHE_DIR": str(work / f"empty-{name}")}
        first = sum(cpu([*command, "run", "recipe.yaml", "out", "-q"], env, work))
        page, merge = median(helps[name]), median(merges[name])
        print(f"{name}: --help {page:.3f} s, {page / plain:.2f} times; ", end="")
        print(f"20M soup {merge:.3f} s user, {merge - imports:.3f} more; first {first:.1f} s CPU")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
