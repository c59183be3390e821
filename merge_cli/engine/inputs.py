"""Everything that a merge reads, checked before the first byte and again before publishing.

A source that is written to meanwhile would give a mixture of two models, which no checksum of the
output could tell from a merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from merge_cli.checkpoint.fingerprint import (
    FileFingerprint,
    fingerprint_of,
    folder_fingerprints,
    sampled_fingerprint,
)
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.lora.adapter import WEIGHTS
from merge_cli.planning.plan import Plan
from merge_cli.sources.source import Source
from merge_cli.system.raw_io import has_header

_HINT = "Run the command again when nothing writes to it: it starts over."


class Inputs:
    """The files of some folders, and files by themselves, as they were.

    Args:
        folders: label and root of each folder -> the fingerprints of its files that matter.
        files: single files, by label.
    """

    def __init__(
        self,
        folders: Iterable[tuple[str, Path, Mapping[Path, FileFingerprint]]],
        files: Iterable[tuple[str, Path]] = (),
    ) -> None:
        self._fingerprints: dict[Path, FileFingerprint] = {}
        self._labels: dict[Path, str] = {}
        self._folders: list[tuple[str, Path, set[Path]]] = []
        for label, root, fingerprints in folders:
            self._folders.append((label, root, set(fingerprints)))
            self._fingerprints |= fingerprints
            self._labels |= dict.fromkeys(fingerprints, label)
        for label, path in files:
            self._labels[path] = label
            if path not in self._fingerprints:
                self._fingerprints[path] = self._looked_at(path)
        self._samples = {path: self._sample_of(path) for path in self._fingerprints}

    @property
    def fingerprint(self) -> str:
        """Of every file's place, size and times: what work over them may be continued by."""
        files = sorted(
            (str(p), s.size, s.modified, s.changed) for p, s in self._fingerprints.items()
        )
        return hashlib.sha256(repr((files, sorted(self._samples.values()))).encode()).hexdigest()

    @property
    def content_fingerprint(self) -> str:
        """Of names, sizes and samples of the files: what another folder with them shares."""
        names = sorted((path.name, fingerprint) for path, fingerprint in self._samples.items())
        return hashlib.sha256(repr(names).encode()).hexdigest()

    def verify(self) -> None:
        """Raise if a file is not what it was.

        Raises:
            SourceError: names the first one.
        """
        for path, earlier_state in self._fingerprints.items():
            if (
                self._looked_at(path) != earlier_state
                or self._sample_of(path) != self._samples[path]
            ):
                raise changed(self._labels[path], path.name)
        for label, root, earlier in self._folders:
            appeared = {
                p for p in folder_fingerprints(root).keys() - earlier if p.suffix != ".safetensors"
            }
            if appeared:
                raise changed(label, min(appeared).name, "has appeared")

    def verify_or(self, discard: Callable[[], None]) -> None:
        """`verify`; what was made of a mixture is thrown away first.

        A file that cannot be looked at may come back as it was: what was made is kept until then.

        Raises:
            SourceError: names the first one.
        """
        try:
            self.verify()
        except CorruptFileError:
            raise
        except SourceError:
            discard()
            raise

    def _looked_at(self, path: Path) -> FileFingerprint:
        try:
            return fingerprint_of(path)
        except OSError as error:
            raise _unreadable(error, self._labels[path], path) from error

    def _sample_of(self, path: Path) -> str:
        try:
            return sampled_fingerprint(path)
        except OSError as error:
            raise _unreadable(error, self._labels[path], path) from error


def inputs_of(plan: Plan) -> Inputs:
    """What a plan reads, which must still be what it was planned with.

    Raises:
        SourceError: a file that has changed since the plan was made.
    """
    folders, files = [], []
    for i, source in enumerate(plan.sources):
        if source.planned:
            continue
        read = plan.shards_read(i)
        weights = {source.root / name for name in read}
        if source.adapter is not None:
            folders.append((source.label, source.adapter.root, source.adapter.fingerprints))
            files.append((source.label, source.adapter.root / WEIGHTS))
        if source.adapter is None or source.adapter.root != source.root:
            folders.append((source.label, source.root, _deciding(source.fingerprints, weights)))
        files += [(source.label, path) for path in sorted(weights)]
    if plan.coefficients is not None:
        files.append((plan.coefficients.path.name, plan.coefficients.path))
    if plan.calibrated is not None:
        files += [("statistics", file.path) for file in plan.calibrated.files]
    inputs = Inputs([folder for folder in folders if folder[2]], files)
    for i, source in enumerate(plan.sources):
        if not source.planned:
            _check_headers(source, plan.shards_read(i))
    inputs.verify()
    return inputs


def changed(label: str, file: str, change: str = "has changed") -> SourceError:
    """The error for a file that is not what it was."""
    return SourceError(f"{change} since it was first read", model=label, file=file, hint=_HINT)


def _deciding(
    fingerprints: Mapping[Path, FileFingerprint], weights: set[Path]
) -> dict[Path, FileFingerprint]:
    """Without files of weights that nobody reads."""
    return {p: s for p, s in fingerprints.items() if p.suffix != ".safetensors" or p in weights}


def _check_headers(source: Source, shards: Iterable[str]) -> None:
    """A file of weights may have been exchanged before there was a fingerprint of it."""
    for name in sorted(shards):
        header = source.header_bytes.get(name)
        if header is not None and not _begins_with(source.root / name, header):
            raise changed(source.label, name)
    adapter = source.adapter
    if adapter is not None and not _begins_with(adapter.root / WEIGHTS, adapter.header):
        raise changed(source.label, WEIGHTS)


def _begins_with(path: Path, header: bytes) -> bool:
    return has_header(path, path.stat().st_size, header)


def _unreadable(error: OSError, label: str, path: Path) -> CorruptFileError:
    hint = "When it is there again as it was, the same command resumes."
    return CorruptFileError(
        f"cannot be read: {error.strerror}", model=label, file=path.name, hint=hint
    )
