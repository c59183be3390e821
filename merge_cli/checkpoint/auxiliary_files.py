"""The files beside the weights: tokenizer, settings and code that a merged model takes over.

They are copied byte for byte; JSON that is not UTF-8 is written as UTF-8. A link that leads out of
its model's folder is refused: it could bring any file of this machine into the output, and from
there to the Hub. Links inside the folder are the model's own, and so are those of the Hub's cache:

    models--org--name/snapshots/COMMIT/tokenizer.json -> ../../blobs/HASH
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from merge_cli.checkpoint.components import MODULES, PIPELINE, module_folders
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.system.untrusted import plain_json, read_json

# Files whose auto_map may name Python files beside them.
_NAME_CODE = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
CARD = "README.md"  # the model card, which says licence and languages

# What transformers looks for beside config.json and the weights, in any of its model families.
COMPANION_NAMES = frozenset(
    (
        "generation_config.json",
        # tokenizers
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "bpe.codes",
        "spiece.model",
        "sentencepiece.bpe.model",
        "spm.model",
        "source.spm",
        "target.spm",
        "normalizer.json",
        "tekken.json",
        "tiktoken.model",
        "tokenization_config.json",
        "chat_template.json",
        # processors
        "preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
        "video_preprocessor_config.json",
        "feature_extractor_config.json",
    )
)
# sentence-transformers: what is done with the model, whatever its tokenizer
_SENTENCES = frozenset((MODULES, "sentence_bert_config.json", "config_sentence_transformers.json"))
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
    ".onnx_data",
    ".pb",
)
_SUFFIXES = (".jinja", ".tiktoken")
_PREFIXES = ("vocab.", "tokenizer.model.")


def is_companion(name: str) -> bool:
    """Whether a file of that name belongs beside merged weights as it is.

    Code (`*.py`) is not: a merge neither runs nor spreads it unless asked.
    """
    if name.endswith((".safetensors", ".py", ".bin", ".pt")):
        return False
    has_known_name = name in COMPANION_NAMES or name in _SENTENCES
    return has_known_name or name.endswith(_SUFFIXES) or name.startswith(_PREFIXES)


def is_weight(name: str) -> bool:
    """Whether a file holds weights, in whatever format, or says which of several does."""
    return name.endswith(_WEIGHTS) or name.endswith(".index.json")


def code_files(names: Iterable[str]) -> list[str]:
    """The Python files beside the weights, which only --trust-remote-code copies."""
    return sorted(name for name in names if "/" not in name and name.endswith(".py"))


def is_tokenizer_file(name: str) -> bool:
    """Whether a companion describes text in and out, rather than generation or images."""
    other = "processor" in name or name == "generation_config.json" or name in _SENTENCES
    return is_companion(name) and not other


def is_part_file(name: str) -> bool:
    """Whether a file in a part's folder belongs to the output as it is."""
    return not name.endswith(".py") and not is_weight(name)


def companion_files(root: Path, *, code: bool = False) -> list[Path]:
    """The companions in a folder, sorted; with `code`, the model's own Python files, too."""
    if not root.is_dir():  # of what is made of adapters alone
        return []
    return sorted(
        path
        for path in root.iterdir()
        if path.is_file() and (is_companion(path.name) or (code and path.suffix == ".py"))
    )


def copied_files(
    config_root: Path, tokenizer_root: Path | None, *, code: bool = False
) -> dict[str, tuple[Path, Path]]:
    """What is copied: name in the output -> the file, and the folder that it is from.

    Args:
        tokenizer_root: None leaves the tokenizer files out.
        code: the config source's Python files, too.
    """
    if (config_root / PIPELINE).is_file():
        paths = [
            path for path in (*config_root.glob("*"), *config_root.glob("*/*")) if path.is_file()
        ]
        result = {path.relative_to(config_root).as_posix(): (path, config_root) for path in paths}
        return {n: item for n, item in result.items() if is_part_file(n) and n != CARD}
    result = {
        path.name: (path, config_root)
        for path in companion_files(config_root, code=code)
        if not is_tokenizer_file(path.name)
    }
    for folder in filter(None, module_folders(config_root)):
        for path in (config_root / folder).glob("*"):
            if path.is_file() and is_part_file(path.name):
                result[f"{folder}/{path.name}"] = path, config_root
    if tokenizer_root is not None:
        tokenizer_files = [p for p in companion_files(tokenizer_root) if is_tokenizer_file(p.name)]
        templates = (tokenizer_root / "additional_chat_templates").glob("*.jinja")
        for path in (*tokenizer_files, *templates):
            result[path.relative_to(tokenizer_root).as_posix()] = path, tokenizer_root
    return result


def check_links(config_root: Path, tokenizer_root: Path, labels: tuple[str, str]) -> None:
    """Refuse links out of the folders that files are copied from.

    Args:
        labels: of the two, for the message.

    Raises:
        SourceError: names every such link.
    """
    result = copied_files(config_root, tokenizer_root, code=True)
    config = config_root / "config.json"
    for root, label in dict(zip((config_root, tokenizer_root), labels, strict=True)).items():
        paths = [path for path, home in result.values() if home == root]
        refuse_links(
            [*paths, *([config] if root == config_root and config.is_file() else [])], root, label
        )


def named_code(root: Path, label: str, names: frozenset[str]) -> list[str]:
    """A note for each companion that names code of the model's own (`auto_map`).

    Args:
        names: the files that the model has, as far as they are here or on the Hub.
    """
    result = []
    for file in _NAME_CODE:
        if not (root / file).is_file():
            continue
        try:
            settings = read_json(root / file, label)
        except CorruptFileError as error:  # copied as it is, whatever it is
            result.append(f"{label}: {file} {error.message}; copied all the same")
            continue
        listed = settings.get("auto_map") if isinstance(settings, dict) else None
        values = listed.values() if isinstance(listed, dict) else [listed]
        words = [w for v in values for w in (v if isinstance(v, list) else [v])]
        # `org/name--modeling.Class` is code of another repository, which stays where it is.
        modules = {
            w.partition(".")[0] + ".py" for w in words if isinstance(w, str) and "--" not in w
        }
        if modules:
            code = ", ".join(sorted(modules))
            missing = sorted(modules - names)
            gone = f"; {', '.join(missing)} is not there" if missing else ""
            result.append(
                f"{file} names code of {label} ({code}), which is copied with "
                f"--trust-remote-code alone{gone}"
            )
    return result


def copy_companions(
    config_root: Path, tokenizer_root: Path | None, target: Path, *, code: bool = False
) -> list[str]:
    """Copy auxiliary files to `target`: the tokenizer's from one source, the rest from another.

    Args:
        tokenizer_root: None leaves the tokenizer files out.
        code: the config source's Python files, too.

    Returns:
        the names of the copied files, sorted.

    Raises:
        SourceError: a file is a link out of its folder.
    """
    result = copied_files(config_root, tokenizer_root, code=code)
    for name, (path, root) in result.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_inside(path, root, target / name)
    return sorted(result)


_HINT = "Replace the link by a copy of the file, if it is meant to be published."


def leads_out(path: Path, root: Path) -> bool:
    """Whether a file in a folder is a link to somewhere that does not belong to it."""
    home = Path(os.path.realpath(root))
    real = Path(os.path.realpath(path))
    allowed = [home]
    repository = home.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        allowed.append(repository / "blobs")
    return not any(target in real.parents for target in allowed)


def refuse_links(paths: Iterable[Path], root: Path, label: str) -> None:
    """Raise if files that would be copied are links out of their folder.

    Raises:
        SourceError: names every one.
    """
    links = [path.relative_to(root).as_posix() for path in paths if leads_out(path, root)]
    if links:
        verb = "is a link" if len(links) == 1 else "are links"
        message = (
            f"{', '.join(sorted(links))} {verb} out of the model's folder, and would be copied"
        )
        raise SourceError(message, model=label, hint=_HINT)


def copy_inside(path: Path, root: Path, target: Path) -> None:
    """Copy a file of a folder, unless it is a link out of it by now.

    JSON in another encoding is written as UTF-8, which is all that transformers reads.

    Raises:
        SourceError: it is.
    """
    refuse_links([path], root, str(root))
    if path.suffix == ".json" and not _is_plain(path):
        target.write_bytes(plain_json(path.read_bytes()))
    else:
        shutil.copyfile(path, target)


def _is_plain(path: Path) -> bool:
    """Whether JSON is UTF-8 without a byte order mark, as far as its first bytes tell."""
    with path.open("rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"
