"""What people type who have not read the help yet: other names of commands and options.

`merge-cli merge` simply runs. Everything else that is no command or option names the nearest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

# Run as if the other name had been typed.
ALIASES = {"merge": "run"}

# Names that people try, and the commands that they mean.
COMMANDS = {
    "mergekit-yaml": "run",
    "mergekit": "run",
    "apply": "run",
    "execute": "run",
    "build": "run",
    "validate": "plan",
    "check": "plan",
    "dry-run": "plan",
    "explain": "plan",
    "new": "init",
    "create": "init",
    "example": "demo",
    "try": "demo",
    "quickstart": "demo",
    "eval": "evaluate",
    "test": "evaluate",
    "score": "evaluate",
    "benchmark": "evaluate",
    "inspect": "analyze",
    "analyse": "analyze",
    "diff": "analyze",
    "list": "methods",
    "method": "methods",
    "upload": "push",
    "publish": "push",
    "extract": "extract-lora",
    "lora": "extract-lora",
    "talk": "chat",
    "ask": "chat",
    "generate": "chat",
    "version": "--version",
    "help": "--help",
}

# The same of options; what a command does not have is not proposed.
OPTIONS = {
    "--force": "--overwrite",
    "-f": "--overwrite",
    "--gpu": "--device",
    "--cpu": "--device",
    "--jobs": "--threads",
    "--workers": "--threads",
    "--memory": "--max-memory",
    "--dataset": "--data",
    "--model": "--base",
    "--baseline": "--against",
    "--compare": "--against",
    "--base": "--against",
    "--temp": "--temperature",
    "--max-new-tokens": "--max-tokens",
    "--out": "OUT",
    "--output": "OUT",
    "-o": "OUT",
    "--check": "--dry-run",
    "--random-state": "--seed",
}


def command_meant(name: str, commands: Collection[str]) -> str:
    """The command that a name nearly is; empty where none is near."""
    if name in COMMANDS:
        return COMMANDS[name]
    words = {**COMMANDS, **ALIASES, **{command: command for command in commands}}
    return _nearest(name.lower(), words)


def option_meant(name: str, options: Collection[str]) -> str:
    """The option, or the argument, that a name nearly is; empty where none is near.

    Args:
        options: the options of the command, with their dashes, and its arguments.
    """
    guess = OPTIONS.get(name, "")
    return guess if guess in options else _nearest(name.lower(), {word: word for word in options})


def _nearest(name: str, words: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, sorted(words), n=1, cutoff=0.6)
    return words[near[0]] if near else ""
