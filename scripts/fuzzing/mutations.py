"""Seeded mutations: of bytes, of JSON and YAML trees, of safetensors headers."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

# What a field is given instead: other types, other sizes, what no field means.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    -5,
    7.5,
    10**9,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**60,
    float("nan"),
    float("inf"),
    -0.0,
    1e308,
    1e-320,
    "",
    " ",
    "x",
    "0",
    "-1",
    "nan",
    "null",
    "x" * 300,
    "x" * 5000,
    "\0",
    "\x1b[31m",
    "\ud800",
    "\u202e",
    "\n",
    "..",
    "../../etc/passwd",
    "/dev/zero",
    "~nosuchuser/x",
    "(a+)+$",
    "(",
    "*",
    "/(/",
    [],
    {},
    [None],
    [[]],
    [{}],
    {"": None},
    {"a": {"b": {}}},
    [1, "a", None],
    [0] * 100,
)
_YAML = (
    "!!bool maybe",
    "!!int ''",
    "!!float x",
    "!!binary a",
    "!x y",
    "*a",
    "&a [*a]",
    "<<: 3",
    "{<<: {a: 1}}",
    ".inf",
    "-.NaN",
    "2024-13-45",
    "1:1:1:1",
    "9" * 400,
    "'",
    '"\\ud800"',
    "[" * 80,
    "? [a]\n: b",
    "\t",
    "\x00",
    "\x85",
    "%YAML 9.9",
    "---",
    "...",
    "@",
    "`",
)


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to three changes at random places."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data) + 1)
        size = draw.choice((1, 1, 2, 8, 64))
        match draw.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = draw.randbytes(size)
            case 4:
                data[at:at] = data[at : at + size]
            case 5:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case _:
                data[at : at + size] = b"\xff" * len(data[at : at + size])
    return bytes(data)


def mutate_tree(tree: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, removed, renamed, moved."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = draw.choice(places)
        value = holder[key]
        match draw.randrange(8):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(draw.choice(VALUES))
            case 3 if isinstance(holder, dict):
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[draw.choice(("", "x", key.upper(), key + "s", "\0", key * 40))] = value
                del holder[key]
            case 5:
                other, place = draw.choice(places)
                if place in other if isinstance(other, dict) else place < len(other):
                    holder[key] = copy.deepcopy(other[place])
            case 6:
                holder[key] = draw.choice(([value], {"a": value}, [value, value], str(value)))
            case _:
                holder[key] = _other_number(value, draw)
    return root[0]


def json_text(tree: Any, draw: random.Random) -> bytes:
    """A tree as a file: at times indented, with a byte order mark, or with a key twice."""
    text = json.dumps(tree, indent=draw.choice((None, None, 2)))
    if draw.random() < 0.03:
        text = text.replace("{", '{"model_type": 3, ', 1)
    if draw.random() < 0.02:
        text = "[" * 3000 + text
    return (b"\xef\xbb\xbf" if draw.random() < 0.02 else b"") + text.encode()


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return mutate_bytes(content, draw)
    return json_text(mutate_tree(json.loads(content), draw), draw)


def mutate_yaml(text: str, tree: Any, draw: random.Random) -> bytes:
    """A recipe with one of its parts changed, as JSON (which is YAML), or its text."""
    way = draw.random()
    if way < 0.6:
        return json_text(mutate_tree(tree, draw), draw)
    if way < 0.9:
        lines = text.split("\n")
        at = draw.randrange(len(lines))
        word = draw.choice(_YAML)
        head, colon, _ = lines[at].partition(": ")
        lines[at] = f"{head}: {word}" if colon else draw.choice((word, lines[at] + word))
        return "\n".join(lines).encode()
    return mutate_bytes(text.encode(), draw)


def mutate_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header; its length word is right, mostly."""
    if draw.random() < 0.2:
        return mutate_bytes(content, draw)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    if draw.random() < 0.2:
        header = mutate_bytes(header, draw)
    else:
        header = json.dumps(mutate_tree(json.loads(header), draw)).encode()
    size = len(header) if draw.random() < 0.9 else draw.choice((0, 1, 2**63, 2**64 - 1, length))
    return struct.pack("<Q", size) + header + data


def _other_number(value: Any, draw: random.Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return draw.choice(VALUES)
    return draw.choice((value + 1, value - 1, -value, value * 2, value * 10**9, float(value)))


def _places(root: Any) -> Any:
    """Every (container, key) of a tree."""
    stack = [root]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])
