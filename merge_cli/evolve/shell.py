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
from merge_cli.evaluation.live import LiveModel, load
from merge_cli.recipe.reference import ModelRef


def load_scaffold(plan: Plan, options: MergeOptions, **loading: Any) -> LiveModel:
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
        live = load(open_source(ModelRef(str(folder)), folder), incomplete=True, **loading)
    live.label = "candidate"
    return live
