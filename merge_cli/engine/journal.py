"""What a merge has done, on disk, so that a killed one continues where it stopped.

One line for each finished chunk, or for several small ones that were merged together (see
system/records.py), written after their bytes. The first line is the key of the work: recipe,
inputs, layout and code. After a crash of the machine itself (another
boot), bytes that the journal calls written may not be on the disk: then only what a `synced` line
covers is believed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.fingerprint import (
    file_fingerprint,
    folder_fingerprints,
    sampled_fingerprint,
)
from merge_cli.engine.merge_stats import TensorStats
from merge_cli.planning.plan import Plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.recipe import search, training
from merge_cli.recipe.named_files import named_files
from merge_cli.recipe.schema import Recipe
from merge_cli.system.libraries import library_version
from merge_cli.system.records import Entry, Records

_FORMAT = 3


class Journal(Records):
    """The chunks of a merge.

    Attributes:
        done: chunk number -> its statistics, from earlier runs.
        count: lines about chunks, old and new.
    """

    def __init__(self, path: Path, key: str, inputs: str = "") -> None:
        """Continue the journal of this key, or begin one.

        Raises:
            ResourceError: it cannot be written.
        """
        super().__init__(path, key, inputs)
        lines = [entry for entry in self.entries if "chunks" in entry]
        self.done = {number: stats for line in lines for number, stats in chunks_of(line)}
        self.count = len(lines)

    def record(self, chunks: Iterable[tuple[int, TensorStats]]) -> None:
        """Note, in one line, that the bytes of these chunks are written."""
        self.append({"chunks": [(number, stats.to_json()) for number, stats in chunks]})
        with self._mutex:
            self.count += 1

    def synced(self, count: int) -> None:
        """Note that what the first `count` lines tell of has reached the disk itself."""
        self.append({"synced": count})
        os.fsync(self._fd)

    def _believed(self, entries: list[Entry], *, same_boot: bool) -> list[Entry]:
        """Of another boot, the lines about chunks that a `synced` line covers."""
        if same_boot:
            return entries
        synced = max((entry["synced"] for entry in entries if "synced" in entry), default=0)
        lines = [entry for entry in entries if "chunks" in entry][:synced]
        return [*lines, {"synced": len(lines)}] if lines else []


def chunks_of(line: Entry) -> list[tuple[int, TensorStats]]:
    """The chunks that a line of a journal is about, with their statistics."""
    return [(number, TensorStats.from_json(stats)) for number, stats in line["chunks"]]


def work_key(plan: Plan, *context: object) -> str:
    """A fingerprint of everything that the output's bytes and the chunks depend on.

    Args:
        context: what else makes it other work: the kind of device, whether statistics are taken.
    """
    if plan.variants:
        keys = [(name, work_key(variant, *context)) for name, variant in plan.variants.items()]
        return hashlib.sha256(repr(("sweep", keys)).encode()).hexdigest()
    try:
        code = inspect.getsource(sys.modules[plan.method.module])
    except (OSError, TypeError):  # defined at a prompt: there is no file to read
        function = inspect.unwrap(plan.method.function)
        code = repr((function.__code__.co_code, function.__code__.co_consts))
    state = hashlib.sha256(f"merge-cli journal {_FORMAT} {version('merge-cli')}\n".encode())
    torch = library_version("torch")
    state.update(repr((torch, plan.method.name, plan.recipe.seed, context)).encode())
    state.update(code.encode())
    if plan.coefficients is not None:
        state.update(plan.coefficients.digest.encode())
    if plan.calibrated is not None:
        state.update(repr(plan.calibrated.digests).encode())
    elif preparations_of(plan):  # a stage: what it will be made with follows from this
        state.update(_prepared_by(plan.recipe))
    made = {
        source.root: (source.label, work_key(plan.stages[source.label], *context))
        for source in plan.sources
        if source.label in plan.stages
    }
    pinned = {
        opened.root
        for source in plan.sources
        for opened in (source, source.adapter)
        if opened is not None and opened.repository is not None
    }
    paths: dict[Path, str] = {}
    fingerprints: list[tuple[str, str]] = []
    settings: dict[int, str] = {}  # by identity: tensors that are treated alike share theirs
    for task in plan.tasks:
        stored = [ref for tensor in task.inputs for ref in tensor.stored]
        for ref in stored:
            if ref.path not in paths:
                # What another document makes is known by how it is made: it need not be there yet.
                stage, fingerprint = made.get(ref.path.parent) or ("", "")
                # `configs/../zoo` and `zoo` are one folder. Links are kept: a file of the Hub is a
                # link only when it has been fetched.
                local = os.path.normpath(ref.path)
                paths[ref.path] = f"{stage}/{ref.path.name}" if stage else local
                if not pinned.isdisjoint(ref.path.parents):
                    fingerprint = (
                        "a commit"  # stands in the path; the file may still have to be fetched
                    )
                fingerprints.append((paths[ref.path], fingerprint or _input_fingerprint(ref.path)))
        inputs: list[Any] = [(paths[r.path], r.name, r.dtype, r.shape, r.offset) for r in stored]
        inputs += [formula for tensor in task.inputs if (formula := tensor.formula)]
        setting = settings.get(id(task.parameters))
        if setting is None:
            setting = settings[id(task.parameters)] = repr(sorted(task.parameters.items()))
        text = f"({task.outputs!r}, {task.action!r}, {task.ids!r}, {inputs!r}){setting}"
        if task.encoding is not None:
            text += f"{task.encoding!r}, keeping blocks: {task.kept is not None}"
        state.update(text.encode())
    state.update(repr(sorted(fingerprints)).encode())
    for shard in plan.shards:
        state.update(shard.file.encode() + shard.header)
    state.update(_auxiliary_content(plan, made))
    return state.hexdigest()


def _prepared_by(recipe: Recipe) -> bytes:
    """What a preparation goes by besides models: its sections, and the files that they name."""
    sections: list[Any] = [
        _options(recipe.training, training.INDIFFERENT),
        _options(recipe.search, search.INDIFFERENT),
        (recipe.statistics, recipe.budget, recipe.methods),
        recipe.objective and recipe.objective.plain(),
        [spec.data for spec in recipe.source_specs],
        library_version("transformers"),
    ]
    contents = [
        (path.name, file_fingerprint(path) if path.is_file() else _folder_content(path))
        for path in named_files(replace(recipe, file="", stages=(), eval=None))
    ]
    return repr((recipe.merge_method, sections, sorted(map(repr, contents)))).encode()


def _options(section: Any, indifferent: Collection[str]) -> list[tuple[str, str]]:
    """What a section says, but for what changes no result."""
    listed = fields(section) if section is not None else ()
    return [(f.name, repr(getattr(section, f.name))) for f in listed if f.name not in indifferent]


def _folder_content(root: Path) -> list[str]:
    """A model that a recipe names, to teach or to judge."""
    return sorted(sampled_fingerprint(path) for path in folder_fingerprints(root))


def _auxiliary_content(plan: Plan, made: Mapping[Path, object]) -> bytes:
    """What config, tokenizer and template of the output are made of: they are part of the work."""
    files = sorted(
        (name, hashlib.sha256(text).digest()) for name, text in plan.aligned.files.items()
    )
    roots = [plan.sources[i].root for i in (plan.config_index, plan.tokenizer_index)]
    origins = [made.get(root, os.path.normpath(root)) for root in roots]
    templates = plan.templates
    parts = [origins, files, templates.text, json.dumps(dict(plan.config), sort_keys=True)]
    parts += [sorted(templates.named.items())] if templates.named else []
    local_roots = {
        source.root for source in plan.sources if source.repository is None and not source.planned
    }
    parts += [
        _auxiliary_fingerprints(root) for root in roots if root in local_roots and root not in made
    ]
    return repr(parts).encode()


def _input_fingerprint(path: Path) -> str:
    """The same header over other weights must not pass for the same input, nor the same times."""
    return f"{path.stat().st_mtime_ns} {sampled_fingerprint(path)}"


def _auxiliary_fingerprints(root: Path) -> list[tuple[str, str]]:
    """The content of what will be copied."""
    files = [
        path for path in folder_fingerprints(root) if path.suffix not in (".safetensors", ".py")
    ]
    return [(path.relative_to(root).as_posix(), sampled_fingerprint(path)) for path in files]
