"""What a teacher predicts, kept on disk: it need not sit beside the model that is compared with it.

Learning (`dam`) and the task `kl` with `top_k` share these files. A teacher runs over its data
once. Of each prediction its k likeliest tokens, their log-probabilities and that of all others
together are kept, in files of a few sequences named by everything that decides their content: the
model's files, k, temperature, dtype, and the tokens. Another run with the same data finds them; the
folder may be deleted at any time.
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
from merge_cli.sources.source import Source
from merge_cli.system.caches import cache_folder
from merge_cli.system.machine import show_size
from merge_cli.system.raw_io import unfinished_file

_FORMAT = 3
_GROUP = 32  # sequences of a file
_LOGIT_BYTES = 1 << 28
_CHUNK = 256  # tokens

Tell = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True)
class KeptPredictions:
    """How predictions are kept.

    Attributes:
        k: tokens; None keeps the whole vocabulary, in memory alone.
    """

    k: int | None
    temperature: float
    dtype: str

    def bytes_of(self, tokens: int, vocabulary: int) -> int:
        """What the predictions of so many tokens take."""
        k = min(self.k or vocabulary, vocabulary)
        return tokens * (k * (4 + (2 if self.dtype == "float16" else 4)) + 4)


class Predictions:
    """A teacher's predictions for some sequences, read when they are needed."""

    def __init__(self, files: Sequence[Path], tables: Sequence[dict[str, Any]] = ()) -> None:
        self._files, self._tables = files, tables

    def of(self, number: int) -> tuple[Any, Any, Any]:
        """ids [n, k], logp [n, k], tail [n] (or None) of a sequence's counted tokens."""
        group, place = divmod(number, _GROUP)
        if self._tables:
            return _part(self._tables[group], place)
        from safetensors import safe_open

        with safe_open(self._files[group], "pt") as file:
            start, stop = file.get_slice("ends")[place : place + 2].tolist()
            names = list(file.keys())  # an open file is no mapping: it has keys() alone
            tail = file.get_slice("tail")[start:stop] if "tail" in names else None
            return file.get_slice("ids")[start:stop], file.get_slice("logp")[start:stop], tail


class Teacher:
    """One source's model as a teacher; loaded only if something is not in the cache yet."""

    def __init__(self, source: Source, digest: str, device: str, dtype: str) -> None:
        self._source, self._digest, self._device, self._dtype = source, digest, device, dtype
        self._live: LiveModel | None = None
        self.tokens = self.passes = 0

    def predictions(
        self,
        examples: Sequence[Example],
        kept: KeptPredictions,
        tell: Tell,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> Predictions:
        """Predictions of all sequences.

        Args:
            share: (number, count): of the missing files make every `count`-th alone; several
                processes make them together and must wait for one another before they read.
        """
        groups = [examples[i : i + _GROUP] for i in range(0, len(examples), _GROUP)]
        total, done = sum(len(example.ids) for example in examples), 0
        tables, files = [], []
        for number, group in enumerate(groups):
            place = self.place(group, kept)
            files.append(place)
            if kept.k is None:
                tables.append(self._predict(group, kept))
            elif number % share[1] == share[0] and not _whole(place, read=True):
                _keep(place, self._predict(group, kept))
            done += sum(len(item.ids) for item in group)
            tell(done, total)
        return Predictions(files, tables)

    def missing(self, examples: Sequence[Example], kept: KeptPredictions) -> int:
        """Sequences that are not in the cache."""
        groups = [examples[i : i + _GROUP] for i in range(0, len(examples), _GROUP)]
        return sum(len(g) for g in groups if kept.k is None or not _whole(self.place(g, kept)))

    def place(self, group: Sequence[Example], kept: KeptPredictions) -> Path:
        """The file of a group of sequences."""
        # Other devices and versions round otherwise: the same command would learn other bits.
        how = f"{self._device.partition(':')[0]} {version('torch')} {version('transformers')}"
        message = f"{self._digest} {self._dtype} {kept.k} {kept.temperature!r} {kept.dtype}"
        about = f"{_FORMAT} {message} {how}"
        state = hashlib.sha256(about.encode())
        for item in group:
            state.update(f"{item.first} {len(item.ids)};".encode() + item.ids.tobytes())
        name = state.hexdigest()
        return cache_folder() / "teachers" / name[:2] / f"{name}.safetensors"

    def close(self) -> None:
        """Give its memory back."""
        self._live = None

    def _predict(self, group: Sequence[Example], kept: KeptPredictions) -> dict[str, Any]:
        import torch

        if self._live is None:
            self._live = load(self._source, device=self._device, dtype=self._dtype)
            refuse_changed(self._source, self._digest)
        live = self._live
        found: dict[int, tuple[Any, Any, Any]] = {}
        budget = max(1, min(live.batch_tokens, _LOGIT_BYTES // (4 * live.vocabulary)))
        for batch in micro_batches(range(len(group)), group, budget):
            ids, mask, counted = padded([group[i] for i in batch])
            logits = live.logits(ids, mask)
            for row, number in enumerate(batch):
                own = logits[row][counted[row].to(logits.device)]
                require_finite(own.float().logsumexp(-1), self._source.label)
                k = live.vocabulary if kept.k is None else kept.k
                found[number] = _in_chunks(own, k, kept.temperature)
        self.tokens, self.passes = live.cost.tokens, live.cost.forward_passes
        parts = [found[i] for i in range(len(group))]
        ends = torch.tensor([0, *(item.counted for item in group)]).cumsum(0)
        dtype = getattr(torch, kept.dtype)
        table = {
            "ends": ends,
            "ids": torch.cat([ids for ids, _, _ in parts]).to("cpu", torch.int32),
            "logp": torch.cat([logp for _, logp, _ in parts]).to("cpu", dtype),
        }
        if parts[0][2] is not None:
            table["tail"] = torch.cat([tail for _, _, tail in parts]).to("cpu", torch.float32)
        return table


def kept_predictions(logits: Any, k: int, temperature: float) -> tuple[Any, Any, Any]:
    """What is kept of a teacher's prediction.

    Args:
        logits: [n, vocabulary], float32 or float64.
        k: tokens to keep; as many as the vocabulary has keeps all.

    Returns:
        ids [n, k], log-probabilities [n, k] at the temperature, and the tail's [n]; the tail is
        None where nothing is left over.
    """
    z = logits / temperature
    whole = z.logsumexp(-1, keepdim=True)
    if k >= z.shape[-1]:
        import torch

        ids = torch.arange(z.shape[-1], device=z.device).expand(z.shape).contiguous()
        return ids, z - whole, None
    ids = z.topk(k, -1).indices
    logp = z.gather(-1, ids) - whole
    tail = z.scatter(-1, ids, float("-inf")).logsumexp(-1) - whole[:, 0]
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


def _part(table: dict[str, Any], place: int) -> tuple[Any, Any, Any]:
    start, stop = table["ends"][place : place + 2].tolist()
    tail = table["tail"][start:stop] if "tail" in table else None
    return table["ids"][start:stop], table["logp"][start:stop], tail


def _whole(place: Path, *, read: bool = False) -> bool:
    """Whether a file is there and is what was written; one that is not is made again.

    Args:
        read: every byte, rather than the header alone.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, "pt") as file:
            names = set(file.keys())
            cached = (file.metadata() or {}).get("sum")
            if not {"ends", "ids", "logp"} <= names or cached is None:
                return False
            return not read or cached == _sum({name: file.get_tensor(name) for name in names})
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


def _keep(place: Path, table: dict[str, Any]) -> None:
    """Write a file whole or not at all.

    Raises:
        ResourceError: the cache cannot be written, and training needs it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    size = sum(value.numel() * value.element_size() for value in table.values())
    try:
        with unfinished_file(place) as file:
            save_file(table, file, {"sum": _sum(table)})
    except (OSError, SafetensorError) as error:
        message = f"the teachers' cache cannot be written ({show_size(size)}): {error}"
        hint = "Free some space, or set MERGE_CLI_CACHE to another folder."
        raise ResourceError(message, where=str(place.parent), hint=hint) from error
