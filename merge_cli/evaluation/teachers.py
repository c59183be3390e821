"""Predictions of teachers, cached on disk, so that a teacher need not stay in memory.

Learning (`dam`) and the task `kl` with `top_k` share these files. A teacher runs over its data
once. Of each prediction the files keep the k likeliest tokens, their log-probabilities, and that of
all other tokens together. Each file has a few sequences and is named by everything that decides its
content: the model's files, k, temperature, dtype, and the tokens. Another run with the same data
uses them; the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.errors import ResourceError
from merge_cli.evaluation.fingerprints import refuse_changed
from merge_cli.evaluation.forward import Example, micro_batches, padded, require_finite
from merge_cli.evaluation.live import LiveModel, load
from merge_cli.evaluation.task import OnProgress
from merge_cli.sources.source import Source
from merge_cli.system.caches import cache_folder
from merge_cli.system.machine import show_size
from merge_cli.system.raw_io import unfinished_file

_FORMAT = 4
_SEQUENCES = 32  # sequences of a file
_LOGIT_BYTES = 1 << 28
_CHUNK = 256  # tokens
_BATCH_TOKENS = 2048  # of a pass; progress is told between passes


@dataclass(frozen=True)
class KeptPredictions:
    """Which predictions are kept, and how.

    Attributes:
        k: tokens; None keeps the complete vocabulary, only in memory.
    """

    k: int | None
    temperature: float
    dtype: str

    def bytes_of(self, tokens: int, vocabulary: int) -> int:
        """Bytes of the predictions of so many tokens."""
        k = min(self.k or vocabulary, vocabulary)
        return tokens * (k * (4 + (2 if self.dtype == "float16" else 4)) + 4)


class Predictions:
    """A teacher's predictions for some sequences, read when they are needed."""

    def __init__(self, files: Sequence[Path], tables: Sequence[dict[str, Any]] = ()) -> None:
        self._files, self._tables = files, tables

    def of(self, number: int) -> tuple[Any, Any, Any]:
        """ids [n, k], logp [n, k], tail [n] (or None) of a sequence's counted tokens."""
        group, index = divmod(number, _SEQUENCES)
        if self._tables:
            return _part(self._tables[group], index)
        from safetensors import safe_open

        with safe_open(self._files[group], "pt") as file:
            start, stop = file.get_slice("ends")[index : index + 2].tolist()
            names = list(file.keys())  # an open file is no mapping, it only has keys()
            tail = file.get_slice("tail")[start:stop] if "tail" in names else None
            return file.get_slice("ids")[start:stop], file.get_slice("logp")[start:stop], tail


class Teacher:
    """One source's model as a teacher; loaded only if something is not in the cache yet."""

    def __init__(self, source: Source, fingerprint: str, device: str, dtype: str) -> None:
        self._source, self._fingerprint, self._device, self._dtype = (
            source,
            fingerprint,
            device,
            dtype,
        )
        self._live: LiveModel | None = None
        self.tokens = self.passes = 0

    def predictions(
        self,
        examples: Sequence[Example],
        settings: KeptPredictions,
        on_progress: OnProgress,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> Predictions:
        """Predictions of all sequences.

        Args:
            share: (number, count): make only every `count`-th of the missing files, so that several
                processes make all of them; they must wait for one another before they read.
        """
        groups = [examples[i : i + _SEQUENCES] for i in range(0, len(examples), _SEQUENCES)]
        total, done = sum(len(example.ids) for example in examples), 0
        tables, files = [], []
        for number, group in enumerate(groups):
            path = self.path(group, settings)
            files.append(path)

            def on_tokens(tokens: int, before: int = done) -> None:
                on_progress(before + tokens, total)

            if settings.k is None:
                tables.append(self._predict(group, settings, on_tokens))
            elif number % share[1] == share[0] and not _is_complete(path, read=True):
                _write(path, self._predict(group, settings, on_tokens))
            done += sum(len(item.ids) for item in group)
            on_progress(done, total)
        return Predictions(files, tables)

    def missing(self, examples: Sequence[Example], settings: KeptPredictions) -> int:
        """Sequences that are not in the cache."""
        groups = [examples[i : i + _SEQUENCES] for i in range(0, len(examples), _SEQUENCES)]
        return sum(
            len(g) for g in groups if settings.k is None or not _is_complete(self.path(g, settings))
        )

    def path(self, group: Sequence[Example], settings: KeptPredictions) -> Path:
        """The file of a group of sequences."""
        # Other devices and versions round differently.
        environment = (
            f"{self._device.partition(':')[0]} {version('torch')} {version('transformers')}"
        )
        model = f"{self._fingerprint} {self._dtype}"
        kept = f"{settings.k} {settings.temperature!r} {settings.dtype}"
        description = f"{_FORMAT} {model} {kept} {environment}"
        state = hashlib.sha256(description.encode())
        for example in group:
            state.update(f"{example.first} {len(example.ids)};".encode() + example.ids.tobytes())
        name = state.hexdigest()
        return cache_folder() / "teachers" / name[:2] / f"{name}.safetensors"

    def close(self) -> None:
        """Free its memory."""
        self._live = None

    def _predict(
        self, group: Sequence[Example], settings: KeptPredictions, on_tokens: Callable[[int], None]
    ) -> dict[str, Any]:
        import torch

        if self._live is None:
            self._live = load(self._source, device=self._device, dtype=self._dtype)
            refuse_changed(self._source, self._fingerprint)
        live = self._live
        predictions: dict[int, tuple[Any, Any, Any]] = {}
        done = 0
        on_tokens(0)
        budget = max(1, min(_BATCH_TOKENS, _LOGIT_BYTES // (4 * live.vocabulary)))
        for batch in micro_batches(range(len(group)), group, budget):
            ids, mask, counted = padded([group[i] for i in batch])
            logits = live.logits(ids, mask)
            for row, number in enumerate(batch):
                counted_logits = logits[row][counted[row].to(logits.device)]
                require_finite(counted_logits.float().logsumexp(-1), self._source.label)
                k = live.vocabulary if settings.k is None else settings.k
                predictions[number] = _in_chunks(counted_logits, k, settings.temperature)
                done += len(group[number].ids)
            on_tokens(done)
        self.tokens, self.passes = live.cost.tokens, live.cost.forward_passes
        parts = [predictions[i] for i in range(len(group))]
        ends = torch.tensor([0, *(example.counted for example in group)]).cumsum(0)
        dtype = getattr(torch, settings.dtype)
        table = {
            "ends": ends,
            "ids": torch.cat([ids for ids, _, _ in parts]).to("cpu", torch.int32),
            "logp": torch.cat([logp for _, logp, _ in parts]).to("cpu", dtype),
        }
        if parts[0][2] is not None:
            table["tail"] = torch.cat([tail for _, _, tail in parts]).to("cpu", torch.float32)
        return table


def kept_predictions(logits: Any, k: int, temperature: float) -> tuple[Any, Any, Any]:
    """The part of a teacher's prediction that is kept.

    Args:
        logits: [n, vocabulary], float32 or float64.
        k: tokens to keep; as many as the vocabulary has keeps all.

    Returns:
        ids [n, k], log-probabilities [n, k] at the temperature, and those of all other tokens
        together [n]; None where there are no others.
    """
    z = logits / temperature
    normaliser = z.logsumexp(-1, keepdim=True)
    if k >= z.shape[-1]:
        import torch

        ids = torch.arange(z.shape[-1], device=z.device).expand(z.shape).contiguous()
        return ids, z - normaliser, None
    ids = z.topk(k, -1).indices
    logp = z.gather(-1, ids) - normaliser
    tail = z.scatter(-1, ids, float("-inf")).logsumexp(-1) - normaliser[:, 0]
    return ids, logp, tail


def _in_chunks(logits: Any, k: int, temperature: float) -> tuple[Any, Any, Any]:
    """`kept_predictions`, some tokens at a time: it makes several float32 copies of its logits."""
    import torch

    parts = [
        kept_predictions(logits[i : i + _CHUNK].float(), k, temperature)
        for i in range(0, len(logits), _CHUNK)
    ]
    ids, logp, tails = zip(*parts, strict=True)
    tail = None if tails[0] is None else torch.cat(tails)
    return torch.cat(ids), torch.cat(logp), tail


def _part(table: dict[str, Any], index: int) -> tuple[Any, Any, Any]:
    start, stop = table["ends"][index : index + 2].tolist()
    tail = table["tail"][start:stop] if "tail" in table else None
    return table["ids"][start:stop], table["logp"][start:stop], tail


def _is_complete(path: Path, *, read: bool = False) -> bool:
    """Whether a file exists and is intact.

    Args:
        read: check every byte, instead of only the header.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            checksum = (file.metadata() or {}).get("sum")
            if not {"ends", "ids", "logp"} <= names or checksum is None:
                return False
            return not read or checksum == _sum({name: file.get_tensor(name) for name in names})
    except (OSError, SafetensorError):
        return False


def _sum(table: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes and bytes."""
    import torch

    state = hashlib.sha256()
    for name, value in sorted(table.items()):
        state.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        state.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _write(path: Path, table: dict[str, Any]) -> None:
    """Write a file completely or not at all.

    Raises:
        ResourceError: the cache cannot be written, and training needs it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    size = sum(value.numel() * value.element_size() for value in table.values())
    try:
        with unfinished_file(path) as file:
            save_file(table, file, {"sum": _sum(table)})
    except (OSError, SafetensorError) as error:
        message = f"the teachers' cache cannot be written ({show_size(size)}): {error}"
        hint = "Free some space, or set MERGE_CLI_CACHE to another folder."
        raise ResourceError(message, where=str(path.parent), hint=hint) from error
