"""Conversations written by a model's chat template, which is a program and is not trusted.

transformers' own code renders it, in another process under limits (`chat_child.py`). The process
is started once and ends with this one.

What a chat template may take.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from merge_cli.recipe.tokenizer import MAX_TEMPLATE
from merge_cli.system.processes import python_command


class TemplateError(ValueError):
    """A template that cannot be used on these messages. The text says why."""


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template(tokenize=False)` has it.

    Raises:
        TemplateError: the template refuses the messages, fails, or takes more time or memory than
            `chat_limits` allows.
    """
    if not _is_jinja(tokenizer):  # a tokenizer that writes conversations by code of its own
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:
            raise TemplateError(str(error)) from error
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none of them the default
        raise TemplateError(str(error)) from None
    if not isinstance(template, str):
        raise TemplateError("it is not text")
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"it has {len(template)} characters (at most {MAX_TEMPLATE})")
    request = {
        "template": template,
        "messages": list(messages),
        "prompt": add_generation_prompt,
        "seconds": SECONDS,
        "special": {name: _plain(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    try:
        line = json.dumps(request).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"the messages are not plain data: {error}") from None
    answer = _renderer().ask(line)
    if "text" not in answer:
        raise TemplateError(str(answer["refused"]))
    return str(answer["text"])


def _is_jinja(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is PreTrainedTokenizerBase.apply_chat_template


def _plain(token: Any) -> Any:
    return [_plain(item) for item in token] if isinstance(token, list | tuple) else str(token)


class _Renderer:
    """The other process, started when it is first needed, and again after a template ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, line: bytes) -> dict[str, Any]:
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if not answer.endswith(b"\n"):
                raise TemplateError(self._ended())
            result: dict[str, Any] = json.loads(answer)
            if "failed" in result:
                self._ended()
                raise TemplateError(f"transformers cannot be started ({result['failed']})")
            return result

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                python_command("merge_cli.evaluation.chat_child"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _ended(self) -> str:
        """Why the process is no more."""
        process = self._process
        assert process is not None
        code = self._closed(process)
        if code == -signal.SIGPROF:
            return f"it does not end within {SECONDS:g} seconds"
        return f"it ends the process that renders it (code {code}): it needs too much memory"

    def _closed(self, process: subprocess.Popen[bytes]) -> int:
        self._process = None
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:  # what was not written yet has nobody to read it
                continue
        return process.wait()

    def close(self) -> None:
        """End the process. It ends by itself, too, when its standard input does."""
        with self._lock:
            if self._process is not None:
                self._closed(self._process)


def _renderer() -> _Renderer:
    """This process's own: after a fork the parent's pipes are the parent's."""
    return _of_process(os.getpid())


@lru_cache(maxsize=1)
def _of_process(_: int) -> _Renderer:
    return _Renderer()


SECONDS = 5.0  # of processor time for one rendering; the slowest in the wild take milliseconds
MAX_MEMORY = 1536 * 2**20  # of address space, of which Python and transformers take 200 MiB
MAX_BYTES = 64 * 2**20  # of a rendered conversation
