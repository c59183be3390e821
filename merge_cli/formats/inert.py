"""Pickles read as data: what they name becomes a record of its name and contents, and no more.

An unpickler calls what a pickle names. Here every name stands for an empty record, so that nothing
is imported and nothing runs; a name that the format does not have is refused. The records are made
anew for each pickle: what one writes into them, no other sees.

The unpickler is the one in Python, which pickle.Unpickler replaces where there is one in C: that
one allocates whatever a pickle of five bytes asks for.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection
from typing import Any

from merge_cli.system.untrusted import Unreadable

_MAX_OBJECTS = 2**24  # a checkpoint of 300 tensors by 1,024 processes has 3 million
# Codes that make an object by a byte: dicts, lists, sets, tuples, instances, places to keep them.
_MAKES_OBJECTS = (b"}", b"]", b"\x8f", b"\x85", b"\x86", b"\x87", b"\x81", b"\x94")


class Record:
    """An object of a pickle.

    Attributes:
        name: the class or function that it was made by, with its module.
        arguments: what that was called with.
        state: what was put into it afterwards: a mapping of attributes, or what its class made.
    """

    name = ""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, attribute: str) -> Any:
        """An attribute; None where there is none."""
        return self.state.get(attribute) if isinstance(self.state, dict) else None

    # Lists, sets and mappings of classes of their own are filled item by item: nobody needs those.
    def append(self, item: Any) -> None:
        """Not kept."""

    def add(self, item: Any) -> None:
        """Not kept."""

    def __setitem__(self, key: Any, item: Any) -> None:
        """Not kept."""


class InertDict(dict[Any, Any]):
    """`collections.OrderedDict`, as which modules give their state."""

    def __setstate__(self, state: Any) -> None:
        """Attributes of it (`_metadata`) are not kept."""


def load_inert(
    raw: bytes,
    allowed: Callable[[str, str], bool],
    persistent: Collection[str] = (),
) -> Any:
    """What a pickle holds, with a `Record` for every object that is not plain data.

    Args:
        allowed: whether the format has a class or function: its module and its name.
        persistent: kinds of references to what lies outside of the pickle, which come as they are.

    Raises:
        Unreadable: a name that is not allowed, or no complete pickle.
    """

    if sum(raw.count(code) for code in _MAKES_OBJECTS) > _MAX_OBJECTS:
        raise Unreadable(f"holds more than {_MAX_OBJECTS} objects")

    class Unpickler(pickle._Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if not allowed(module, name):
                raise Unreadable(f"names {module[:60]}.{name[:60]}, which the format has not")
            if (module, name) == ("collections", "OrderedDict"):
                return InertDict
            return type(name, (Record,), {"name": f"{module}.{name}"})

        def persistent_load(self, reference: Any) -> Any:
            if isinstance(reference, tuple) and reference and reference[0] in persistent:
                return reference
            raise Unreadable("refers to something outside of the pickle")

    try:
        return Unpickler(io.BytesIO(raw)).load()
    except Unreadable:
        raise
    except (MemoryError, RecursionError) as error:
        raise Unreadable(f"is no pickle of the format: {type(error).__name__}") from None
    except Exception as error:  # a broken pickle can raise anything
        raise Unreadable(f"is no pickle of the format: {str(error)[:200]}") from None


def name_of(item: Any) -> str:
    """The name of a record, or of a class that stands for itself: `torch.float32`."""
    kind = item if isinstance(item, type) else type(item)
    return kind.name if issubclass(kind, Record) else ""
