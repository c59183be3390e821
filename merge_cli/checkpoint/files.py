"""The files beside the weights: what a merged model inherits from its donor, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from merge_cli.checkpoint.components import PIPELINE

CARD = "README.md"  # the model card, which says licence and languages

# What transformers looks for beside config.json and the weights, in any of its model families.
_COMPANIONS = frozenset((
    "generation_config.json",
    # tokenizers
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "bpe.codes", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm",
    "target.spm", "normalizer.json", "tekken.json", "tiktoken.model", "tokenization_config.json",
    "chat_template.json",
    # processors
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json",
    # sentence-transformers
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
))  # fmt: skip
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx",
            ".onnx_data", ".pb")  # fmt: skip
_SUFFIXES = (".jinja", ".tiktoken")
_PREFIXES = ("vocab.", "tokenizer.model.")


def is_companion(name: str) -> bool:
    """Whether a file of that name belongs beside merged weights as it is.

    Code (`*.py`) is not: a merge neither runs nor spreads it unless asked.
    """
    if name.endswith((".safetensors", ".py", ".bin", ".pt")):
        return False
    return name in _COMPANIONS or name.endswith(_SUFFIXES) or name.startswith(_PREFIXES)


def is_weight(name: str) -> bool:
    """Whether a file holds weights, in whatever format, or says which of several does."""
    return name.endswith(_WEIGHTS) or name.endswith(".index.json")


def code_files(names: Iterable[str]) -> list[str]:
    """The Python files beside the weights, which only --trust-remote-code copies."""
    return sorted(name for name in names if "/" not in name and name.endswith(".py"))


def is_tokenizer_file(name: str) -> bool:
    """Whether a companion describes text in and out, rather than generation or images."""
    return is_companion(name) and "processor" not in name and name != "generation_config.json"


def companion_files(root: Path, *, code: bool = False) -> list[Path]:
    """The companions in a folder, sorted; with `code`, the model's own Python files, too."""
    return sorted(
        path
        for path in root.iterdir()
        if path.is_file() and (is_companion(path.name) or (code and path.suffix == ".py"))
    )


def _copy_pipeline(donor: Path, target: Path) -> list[str]:
    """Everything but weights, code and the card, of the folder and of those in it."""
    copied = []
    for path in sorted([*donor.glob("*"), *donor.glob("*/*")]):
        name = path.relative_to(donor).as_posix()
        if path.is_file() and path.suffix != ".py" and not is_weight(name) and name != CARD:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
            copied.append(name)
    return copied


def copy_companions(
    donor: Path, tokenizer_donor: Path | None, target: Path, *, code: bool = False
) -> list[str]:
    """Copy companions to `target`: tokenizer files from one donor, the rest from the other.

    Args:
        tokenizer_donor: None leaves the tokenizer files out.
        code: the donor's Python files, too.

    Returns:
        the names of the copied files, sorted.
    """
    if (donor / PIPELINE).is_file():
        return _copy_pipeline(donor, target)
    chosen = {p.name: p for p in companion_files(donor, code=code) if not is_tokenizer_file(p.name)}
    if tokenizer_donor is not None:
        found = companion_files(tokenizer_donor)
        chosen |= {p.name: p for p in found if is_tokenizer_file(p.name)}
        templates = tokenizer_donor / "additional_chat_templates"
        if templates.is_dir():
            (target / templates.name).mkdir(exist_ok=True)
            for path in sorted(templates.glob("*.jinja")):
                shutil.copyfile(path, target / templates.name / path.name)
    for name, path in chosen.items():
        shutil.copyfile(path, target / name)
    return sorted(chosen)
