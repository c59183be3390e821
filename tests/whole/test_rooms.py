"""The package's folders import downhill: the order of the rooms, and no way back up.

    errors                                          words for what went wrong
    options                                         how a merge is run; progress
    system                                          files, memory, processes, untrusted input
    recipe                                          a recipe's YAML, typed
    checkpoint                                      headers, dtypes, tensors, config
    kernels · hub · remote · formats                numbers · downloads · storage formats
    lora · methods                                  adapters · merge methods
    sources                                         an opened model
    tokenizer                                       vocabularies
    planning                                        a recipe and headers become a Plan
    engine                                          executes a Plan
    cluster                                         executes a Plan on several machines
    evaluation · report · publishing · conversion   look at models, write about them
    data                                            what the sources' data say, as token sequences
    calibration · evolve                            preparations
    dam                                             a preparation that starts from their merges
    auto                                            a preparation that tries the others
    adapters · analysis · drafting · comparison     what else is done with models
    chat                                            talking to a model
    json_schema                                     a recipe's JSON Schema, from all of the above
    documents                                       a plan carried out: documents, sweeps, adapters
    api · demo · console                            the front door, a try, what a terminal shows
    averages                                        running averages on disk, made of merges
    cli                                             the command line

A folder may import from lines above its own. Imports inside functions count, and so do those for
type checkers: what needs a name of another room to be understood depends on it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import merge_cli

ROOT = Path(merge_cli.__file__).parent


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_graph(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """For each folder or single module of the package those that it imports, with one example."""
    graph: dict[str, dict[str, str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        edges = graph.setdefault(parts[0], {})
        for name in imported(path):
            package, *inside = name.split(".")
            if package != "merge_cli" or not inside or inside[0] == parts[0]:
                continue
            if (root / inside[0]).is_dir() or (root / f"{inside[0]}.py").is_file():
                edges.setdefault(inside[0], f"{'/'.join(parts)} imports {name}")
    return graph


def reachable(graph: dict[str, dict[str, str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for room in graph.get(waiting.pop(), {}):
            if room not in seen:
                seen.add(room)
                waiting.append(room)
    return seen


def test_no_room_imports_one_that_needs_it() -> None:
    graph = room_graph()
    after = {room: reachable(graph, room) for room in graph}
    cycles = {
        (room, other): example
        for room, edges in graph.items()
        for other, example in edges.items()
        if room in after.get(other, set())
    }
    assert cycles == {}


def test_the_table_above_is_the_order() -> None:
    lines = [line for line in (__doc__ or "").splitlines() if line.startswith("    ")]
    level = {
        room: number
        for number, line in enumerate(lines)
        for room in line.strip().split("  ")[0].split(" · ")
    }
    graph = room_graph()
    assert graph.keys() == level.keys()
    upward = [
        example
        for room, edges in graph.items()
        for other, example in edges.items()
        if level[other] > level[room]
    ]
    assert upward == []


def test_the_engine_knows_nothing_of_a_recipe_file() -> None:
    reads_yaml = ("load", "parse", "nodes", "fields", "dump")
    modules = {f"merge_cli.recipe.{name}" for name in reads_yaml}
    engine = [(path, name) for path in (ROOT / "engine").glob("*.py") for name in imported(path)]
    assert [pair for pair in engine if pair[1].rpartition(".")[0] in modules] == []
