"""The live model before it is anything: the output's config, tokenizer and shapes, any weights.

It is loaded by the same code as a merged model on disk, from a folder of links, so that both answer
alike down to the generation settings.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_cli.checkpoint.shards import INDEX
from merge_cli.checkpoint.source import open_source
from merge_cli.engine.merge import write_companions
from merge_cli.engine.options import MergeOptions
from merge_cli.engine.plan import Plan
from merge_cli.errors import MismatchError, Problem
from merge_cli.evaluation.live import LiveModel, load
from merge_cli.recipe.reference import ModelRef


def load_shell(plan: Plan, options: MergeOptions, **loading: Any) -> LiveModel:
    """A model with the plan's config and tokenizer and its donor's weights, soon to be replaced.

    Args:
        loading: as for `evaluation.live.load`.

    Raises:
        SourceError: transformers cannot load it.
        ResourceError: the device is not there, or the model does not fit in its memory.
    """
    donor = plan.sources[plan.donor]
    with TemporaryDirectory(prefix="merge-cli-live-") as name:
        folder = Path(name)
        write_companions(plan, folder, options)
        if not plan.config:
            (folder / "config.json").symlink_to((donor.root / "config.json").resolve())
        (folder / INDEX).unlink(missing_ok=True)
        for file in donor.root.iterdir():
            if file.suffix == ".safetensors" or file.name == INDEX:
                (folder / file.name).symlink_to(file.resolve())
        live = load(open_source(ModelRef(str(folder)), folder), **loading)
    live.label = "candidate"
    return live


def find_seats(plan: Plan, net: Any) -> dict[str, Any]:
    """For each output tensor the parameter or buffer that holds it.

    Raises:
        MismatchError: parameters that no output tensor is for: transformers builds them from
            tensors that are stored otherwise, or they are not in this process's memory.
    """
    found = dict(net.named_parameters())
    needed = set(found)
    found |= {name: value for name, value in net.named_buffers() if name not in found}
    ends: dict[str, list[str]] = {}
    for name in found:
        parts = name.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), []).append(name)
    seats: dict[str, Any] = {}
    for task in plan.tasks:
        own: str | None = task.name if task.name in found else None
        if own is None and len(ends.get(task.name, ())) == 1:
            own = ends[task.name][0]  # transformers may put a prefix before it
        if own is not None and tuple(found[own].shape) == task.shape:
            seats[task.name] = found[own]
            needed.discard(own)
    elsewhere = [name for name, value in found.items() if value.device.type == "meta"]
    problems = [
        Problem("no tensor of the output is this parameter, so that it cannot be rewritten", name)
        for name in sorted(needed)
    ] + [Problem("does not fit in memory, so that it cannot be rewritten", n) for n in elsewhere]
    if problems:
        raise MismatchError(problems, "no live model can be made of what is stored")
    return seats
