"""What docstrings name exists: arguments of functions, attributes and arguments of classes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import merge_cli

ROOT = Path(merge_cli.__file__).parent
_ENTRY = re.compile(r"^    ([\w*]+(?:, [\w*]+)*): ")


def entries(docstring: str, section: str) -> Iterator[str]:
    """The names that a section lists; lines that go on are indented further."""
    _, found, text = docstring.partition(f"{section}:\n")
    for line in text.splitlines() if found else ():
        if line and not line.startswith("    "):
            return
        if match := _ENTRY.match(line):
            yield from match[1].replace("*", "").split(", ")


def missing(node: ast.AST, source: str) -> set[str]:
    """Names in the docstring of a function or class that its code does not have."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        given = node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        known = {argument.arg for argument in every if argument is not None}
        return set(entries(ast.get_docstring(node) or "", "Args")) - known
    if isinstance(node, ast.ClassDef):
        docstring = ast.get_docstring(node) or ""
        names = {*entries(docstring, "Args"), *entries(docstring, "Attributes")}
        body = (ast.get_source_segment(source, node) or "").split('"""', 2)[-1]
        inherited = {"self", *(base.id for base in node.bases if isinstance(base, ast.Name))}
        words = set(re.findall(r"\w+", body)) | inherited
        return names - words if len(inherited) == 1 else set()
    return set()


def test_docstrings_name_what_is_there() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if names := missing(node, source):
                wrong.append(
                    f"{path.relative_to(ROOT)}, {getattr(node, 'name', '')}: {sorted(names)}"
                )
    assert wrong == []


def test_a_wrong_name_is_seen() -> None:
    source = 'def f(a, *, b):\n    """Do.\n\n    Args:\n        a, c: x.\n        b: y.\n    """\n'
    assert missing(ast.parse(source).body[0], source) == {"c"}
