"""What a config means that does not say: the defaults of its class, read from transformers' source.

The class is not imported, which would take seconds: its file is parsed. Of version 5 these are the
annotated attributes, of version 4 the arguments of `__init__`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_TYPE = re.compile(r"[A-Za-z0-9_-]{1,80}")


@lru_cache(maxsize=64)
def class_defaults(model_type: str) -> Mapping[str, Any]:
    """Key -> value where a config of this type is silent; empty for a type that is not known."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None or not _TYPE.fullmatch(model_type):
        return {}
    models = Path(spec.origin).parent / "models"
    for file in _files(models, model_type.replace("-", "_")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue  # no file of transformers that is read here
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found = dict(_attributes(node))
                if found.get("model_type") == model_type:
                    return found
    return {}


def _files(models: Path, name: str) -> Iterator[Path]:
    """Where a type may be: in the folder of its name, or of the whole that it is a part of."""
    parts = name.split("_")
    for count in range(len(parts), 0, -1):
        yield from sorted((models / "_".join(parts[:count])).glob("configuration_*.py"))


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for line in node.body:
        if isinstance(line, ast.FunctionDef) and line.name == "__init__":
            arguments = line.args.args[-len(line.args.defaults) :] if line.args.defaults else []
            for argument, default in zip(arguments, line.args.defaults, strict=True):
                yield from _value(argument.arg, default)
        elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield from _value(line.target.id, line.value)
        elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            yield from _value(line.targets[0].id, line.value)


def _value(name: str, node: ast.expr | None) -> Iterator[tuple[str, Any]]:
    """Literals; also of `interval(...)(default=0.02)`."""
    if isinstance(node, ast.Call):
        node = next((word.value for word in node.keywords if word.arg == "default"), None)
    try:
        if node is not None:
            yield name, ast.literal_eval(node)
    except ValueError:
        return  # computed: not known without running it
