"""Writing a model as a GGUF file, in bounded memory.

The file appears only when it is whole: it is written beside its place, and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from merge_cli.checkpoint.dtypes import MERGEABLE, SAFETENSORS_NAMES
from merge_cli.checkpoint.tensors import Read, read_numbers, reading
from merge_cli.engine.inputs import Inputs
from merge_cli.errors import NonFiniteError, SourceError, UsageError
from merge_cli.formats.detect import advice
from merge_cli.formats.gguf.block_encoding import KINDS, encode
from merge_cli.formats.gguf.header import DEFAULT_ALIGNMENT
from merge_cli.formats.gguf.vocabulary import vocabulary_keys
from merge_cli.formats.gguf.writing import GgufPlan, Piece, plan_file
from merge_cli.options import Progress
from merge_cli.recipe.reference import parse_reference
from merge_cli.sources.opening import open_source
from merge_cli.sources.result_files import refuse_replacing
from merge_cli.sources.source import Source, fetch_weights
from merge_cli.system.raw_io import unfinished_file, write_error
from merge_cli.system.untrusted import Unreadable
from merge_cli.tokenizer.files import chat_templates, settings_json, tokenizer_json

_AT_ONCE = 2**18  # elements: whole blocks of every kind


def write_gguf(
    model: str, out: Path, *, kind: str, overwrite: bool, on_progress: Callable[[Progress], None]
) -> tuple[int, int, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Write a model as a GGUF file.

    Args:
        kind: of its matrices: float32, float16, bfloat16 or q8_0; empty for the model's own dtype.
        overwrite: replace OUT, if it is a file that ends with .gguf.

    Returns:
        tensors, bytes, two empty lists, and notes: as `run.Converted` has them.

    Raises:
        UsageError: OUT is there, or is what is read; no such kind.
        SourceError: a model or a tokenizer that the format cannot express.
        ResourceError: the file cannot be written.
    """
    if out.exists() and not (overwrite and out.is_file()):
        hint = "Choose another file, or replace it with --overwrite."
        raise UsageError("the output exists already", where=str(out), hint=hint)
    here = Path.cwd()
    source = open_source(parse_reference(model, here), here)
    refuse_replacing({"OUT": out}, [source], overwrite=overwrite)
    plan, name = _planned(source, kind)
    fetch_weights(source, source.header_bytes)
    weights = [source.root / file for file in source.header_bytes]
    inputs = Inputs(
        [(source.label, source.root, source.fingerprints)] if source.fingerprints else [],
        [(source.label, path) for path in weights],
    )
    try:
        with unfinished_file(out) as new:
            with new.open("wb") as file, reading() as read:
                for done in _write(plan, file, read, source.label):
                    on_progress(Progress("convert", done, plan.size, out.name))
            os.chmod(new, 0o644)
            inputs.verify()
    except OSError as error:
        raise write_error(error, out) from error
    return len(plan.pieces), plan.size, (), (), (f"matrices are written as {name}",)


def _planned(source: Source, kind: str) -> tuple[GgufPlan, str]:
    """The file, and the name of its kind."""
    refused = advice(source.config)
    if refused is not None:
        message = f"its weights are quantised ({refused[0]})"
        raise SourceError(message, model=source.label, hint=refused[1])
    embedding = source.tensors.get("model.embed_tokens.weight")
    default = embedding.default_dtype if embedding is not None else ""
    name = (
        "Q8_0" if kind.lower() == "q8_0" else SAFETENSORS_NAMES.get(kind, "") if kind else default
    )
    if name not in KINDS or (not kind and name not in MERGEABLE):
        message = f"'{kind or default}' is nothing that matrices are written as in GGUF"
        raise UsageError(message, hint="Use float32, float16, bfloat16 or q8_0.")
    document = tokenizer_json(source)
    if not document:
        message = "it has no tokenizer.json, and a GGUF file needs the vocabulary"
        raise SourceError(message, model=source.label)
    templates = chat_templates(source)
    rows = embedding.shape[0] if embedding is not None else 0
    try:
        vocabulary = vocabulary_keys(document, settings_json(source), templates, rows)
    except Unreadable as error:
        message = f"its tokenizer cannot be written as GGUF: {error}"
        raise SourceError(message, model=source.label, file="tokenizer.json") from None
    plan = plan_file(source.tensors, source.config, vocabulary, KINDS[name], source.label)
    return plan, name


def _write(plan: GgufPlan, file: BinaryIO, read: Read, label: str) -> Iterator[int]:
    """Write everything; yields how many bytes are written."""
    file.write(plan.header)
    for piece in plan.pieces:
        file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))
        for numbers in _blocks(piece, read):
            raw = encode(numbers, piece.kind)
            _refuse_non_finite(numbers, raw, piece, label)
            file.write(raw)
        yield file.tell()


def _blocks(piece: Piece, read: Read) -> Iterator[Any]:
    """A tensor's numbers as float32, block by block."""
    if piece.tensor is None:
        yield piece.numbers
        return
    for start in range(0, piece.tensor.size, _AT_ONCE):
        count = min(_AT_ONCE, piece.tensor.size - start)
        yield read_numbers(read, piece.tensor, start, count)


def _refuse_non_finite(numbers: Any, raw: bytes, piece: Piece, label: str) -> None:
    """Raise for NaN and Inf, and for what float16 has no number for."""
    import numpy as np

    if not np.isfinite(numbers).all():
        raise NonFiniteError("holds NaN or Inf", model=label, tensor=piece.name)
    largest = float(np.abs(numbers).max()) if len(numbers) else 0.0
    limit = {"F16": 65504.0, "Q8_0": 65504.0 * 127}.get(piece.kind.name)
    if limit is not None and largest > limit:
        message = f"holds {largest:.3g}, which {piece.kind.name} has no number for"
        raise NonFiniteError(message, model=label, tensor=piece.name, hint="Write bfloat16.")
