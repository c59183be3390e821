"""One source's part of what is gathered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.source import Source
from merge_cli.checkpoint.statistics import StatisticsFile
from merge_cli.gathering.data import Examples
from merge_cli.gathering.store import statistics_path
from merge_cli.recipe.statistics import Statistics

_FORMAT = 1
Tell = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True)
class SourcePart:
    """What has to be known of one source.

    Attributes:
        data: files or data set, as the recipe names them.
        identity: of the model's files; None where nobody has read them yet.
        seed: the recipe's.
        device, dtype: what the model runs on and in.
        found: what the cache has.
        about: what the file will say of itself, as far as it is known.
    """

    source: Source
    data: str
    examples: Examples
    identity: str | None
    kind: str
    statistics: Statistics
    seed: int
    device: str
    dtype: str
    found: StatisticsFile | None = None
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def place(self) -> Path:
        """The file, named by everything that decides its content."""
        assert self.identity is not None, "who gathers knows what from"
        dials = self.statistics
        drawn = dials.targets == "sampled"
        own = (
            (dials.batch_tokens,)
            if self.kind == "gram"
            else (dials.targets, self.seed if drawn else None)
        )
        # Other devices and versions round otherwise.
        how = [self.device.partition(":")[0], self.dtype, version("torch"), version("transformers")]
        key = json.dumps([_FORMAT, self.kind, self.identity, self.examples.digest, own, how])
        return statistics_path(hashlib.sha256(key.encode()).hexdigest())
