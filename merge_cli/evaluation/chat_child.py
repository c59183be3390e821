"""Render chat templates for `chat.py`, in a process of its own, where little can go wrong.

A template is a program of somebody else's: it can loop for years and ask for all memory, at once
and inside single operations. So the system watches over it: each rendering has seconds of
processor time, the process has an amount of memory, and what is over them ends the process.

Requests and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from functools import cached_property
from typing import Any

from merge_cli.evaluation.chat import MAX_BYTES, MAX_MEMORY


def main() -> None:
    """Answer until standard input ends: with the parent, whatever becomes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    try:
        shell = _shell()
    except Exception as error:  # a transformers that cannot be imported, for whatever reason
        answers.write(_line({"failed": f"{type(error).__name__}: {error}"}))
        answers.flush()
        return
    _limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even inside an operation
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = _answer(shell, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer)
        answers.flush()


def _answer(shell: Any, request: dict[str, Any]) -> bytes:
    try:
        shell.special_tokens_map = request["special"]
        text = shell.apply_chat_template(
            request["messages"],
            chat_template=request["template"],
            tokenize=False,
            add_generation_prompt=request["prompt"],
        )
        answer = _line({"text": text})
        if len(answer) <= MAX_BYTES:
            return answer
        return _line({"refused": f"it writes more than {MAX_BYTES // 2**20} MiB"})
    except OverflowError as error:
        return _line({"refused": f"it asks for too much ({error})"})
    except MemoryError:
        return _line({"refused": f"it needs more than {MAX_MEMORY // 2**20} MiB of memory"})
    except RecursionError:
        return _line({"refused": "it nests without end"})
    except Exception as error:  # templates are programs, and raise what they like
        return _line({"refused": str(error)[:1000]})


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _shell() -> Any:
    """A tokenizer without tokens: what renders is transformers' own code."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class Shell(PreTrainedTokenizerFast):  # type: ignore[misc]  # transformers has no types here
        @cached_property
        def special_tokens_map(self) -> dict[str, Any]:
            return {}

    return Shell(tokenizer_object=Tokenizer(models.WordLevel({})))


def _limit_memory() -> None:
    import resource

    # A system without this limit, or with a lower one, has the limit on time alone.
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, hard))


if __name__ == "__main__":
    main()
