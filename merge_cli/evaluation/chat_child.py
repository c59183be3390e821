"""The process that renders chat templates for `chat.py`, with limits on time and memory.

A template is an untrusted program: it can loop for years or ask for all memory, even inside a
single operation. So the system enforces limits: on processor time for each rendering, and on memory
for the process. A template that exceeds them ends the process.

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
    """Answer requests until standard input ends, which it does when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    try:
        tokenizer = _template_tokenizer()
    except Exception as error:  # transformers cannot be imported
        answers.write(_line({"failed": f"{type(error).__name__}: {error}"}))
        answers.flush()
        return
    _limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even inside an operation
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = _answer(tokenizer, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer)
        answers.flush()


def _answer(tokenizer: Any, request: dict[str, Any]) -> bytes:
    try:
        tokenizer.special_tokens_map = request["special"]
        text = tokenizer.apply_chat_template(
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
    except Exception as error:  # templates can raise anything
        return _line({"refused": str(error)[:1000]})


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _template_tokenizer() -> Any:
    """A tokenizer without tokens, to render templates with transformers' code."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class TemplateTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]  # transformers has no types here
        @cached_property
        def special_tokens_map(self) -> dict[str, Any]:
            return {}

    return TemplateTokenizer(tokenizer_object=Tokenizer(models.WordLevel({})))


def _limit_memory() -> None:
    import resource

    # Where the system has no such limit, or a lower one, only time is limited.
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, hard))


if __name__ == "__main__":
    main()
