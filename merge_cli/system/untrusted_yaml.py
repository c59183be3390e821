"""Read untrusted YAML: bounded before it is built. untrusted.py does the same for JSON.

A few lines of YAML can mean billions of values, since an alias stands for all that its anchor
holds. The size that a document would have without aliases is counted while it is read; so are its
levels.

    GuardedLoader    PyYAML's, within bounds; errors are yaml.YAMLError, with line and column
    read_front       the plain texts and lists of a model card's front matter
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from merge_cli.system.untrusted import CONTROL, MAX_DEPTH, Unreadable, called

# The longest recipes (a resolved search over every layer) have 100 kB, the longest front matters
# of cards (results of a hundred benchmarks) 400 kB. PyYAML reads about 100 kB in a second.
MAX_YAML = 2**19
# Values of a document, each alias counted as all that it stands for.
MAX_VALUES = 200_000


class _Bounded(yaml.parser.Parser, yaml.composer.Composer):
    """Composes nodes as PyYAML does, and counts."""

    _depth = 0
    _sizes: dict[int, int]  # of every node so far, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs
        if self._depth >= MAX_DEPTH:
            raise _refused(f"it nests deeper than {MAX_DEPTH} levels", event)
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _refused("an alias that contains itself", event)
            return node
        children = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        size = 1 + sum(self._sizes[id(child)] for child in children)
        if size > MAX_VALUES:
            message = f"it stands for more than {MAX_VALUES} values, with every alias written out"
            raise _refused(message, event)
        self._sizes[id(node)] = size
        return node


def _refused(message: str, event: Any) -> yaml.composer.ComposerError:
    return yaml.composer.ComposerError(None, None, message, event.start_mark)


class GuardedLoader(_Bounded, yaml.SafeLoader):
    """PyYAML's safe loader, within bounds."""

    def __init__(self, text: str) -> None:
        yaml.SafeLoader.__init__(self, text)
        self._sizes = {}


class _TextLoader(_Bounded, yaml.BaseLoader):
    def __init__(self, text: str) -> None:
        yaml.BaseLoader.__init__(self, text)
        self._sizes = {}


def read_front(text: str) -> Any:
    """YAML whose scalars all stay text, as what describes something is read.

    Raises:
        Unreadable: no YAML, or out of bounds.
    """
    if len(text) > MAX_YAML:
        raise Unreadable(f"is YAML of more than {MAX_YAML} characters")
    try:
        loader = _TextLoader(text)
        try:
            single_data = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise Unreadable(f"is not valid YAML: {yaml_reason(error, text)[0]}") from None
    except (ValueError, TypeError, RecursionError) as error:  # a key that is a list
        raise Unreadable(f"is not valid YAML: {error}") from None
    for word in _texts(single_data):
        if wrong := CONTROL.search(word):
            raise Unreadable(f"holds {called(wrong[0])}")
    return single_data


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(part)


def yaml_reason(error: yaml.YAMLError, text: str) -> tuple[str, int, int]:
    """What PyYAML has against a text, with line and column (from 1; 0 where it does not say)."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        reason = str(error.problem or error.context)
        if "'\\t'" in reason:
            reason = "a tab in the indentation: use spaces"
        return reason, line, column
    if isinstance(error, yaml.reader.ReaderError):
        # Of text (not of bytes) the position is an index and the character its number.
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1
        code: Any = error.character
        number = code if isinstance(code, int) else ord(code)
        return f"the character U+{number:04X}, which no YAML may hold", line, column
    return str(error), 0, 0
