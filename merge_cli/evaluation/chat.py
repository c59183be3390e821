"""Rendering conversations with a model's chat template, which is a program and is not trusted.

transformers' code renders it, in another process with limits (`chat_child.py`). The process is
started once and ends with this one.
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

from merge_cli.errors import SourceError
from merge_cli.system.chat_templates import MAX_TEMPLATE
from merge_cli.system.processes import python_command

SECONDS = 5.0  # of processor time for one rendering; known templates take milliseconds
MAX_MEMORY = 1536 * 2**20  # of address space, of which Python and transformers take 200 MiB
MAX_BYTES = 64 * 2**20  # of a rendered conversation


class TemplateError(ValueError):
    """A template that cannot render these messages, with the reason."""


SYSTEM_WITHOUT_CHAT = "system is a message of a conversation: it needs chat_template: true"


def require_template(tokenizer: Any, label: str) -> None:
    """Check that a model's tokenizer can render conversations.

    Raises:
        SourceError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        message = "chat_template: true, and its tokenizer has no chat template"
        raise SourceError(message, model=label, hint="Leave it out, or use `false`.")


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template(tokenize=False)` has it.

    Raises:
        TemplateError: the template refuses the messages, fails, or takes more time or memory than
            the limits below allow.
    """
    if not _is_jinja(tokenizer):  # a tokenizer with its own code for conversations
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
    except ValueError as error:  # several templates without a default
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

    method = getattr(type(tokenizer), "apply_chat_template", None)
    return method is PreTrainedTokenizerBase.apply_chat_template


def _plain(token: Any) -> Any:
    return [_plain(item) for item in token] if isinstance(token, list | tuple) else str(token)


class _Renderer:
    """The other process, started when it is needed, and again after a template has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, line: bytes) -> dict[str, Any]:
        with self._lock:
            process = self._start_process()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if not answer.endswith(b"\n"):
                raise TemplateError(self._end_reason())
            reply: dict[str, Any] = json.loads(answer)
            if "failed" in reply:
                self._end_reason()
                raise TemplateError(f"transformers cannot be started ({reply['failed']})")
            return reply

    def _start_process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                python_command("merge_cli.evaluation.chat_child"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _end_reason(self) -> str:
        """Why the process has ended."""
        process = self._process
        assert process is not None
        code = self._close_process(process)
        if code == -signal.SIGPROF:
            return f"it does not end within {SECONDS:g} seconds"
        return f"it ends the process that renders it (code {code}): it needs too much memory"

    def _close_process(self, process: subprocess.Popen[bytes]) -> int:
        self._process = None
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:  # the process that reads it has ended
                continue
        return process.wait()

    def close(self) -> None:
        """End the process. It also ends when its standard input is closed."""
        with self._lock:
            if self._process is not None:
                self._close_process(self._process)


def _renderer() -> _Renderer:
    """This process's renderer: after a fork the pipes belong to the parent."""
    return _of_process(os.getpid())


@lru_cache(maxsize=1)
def _of_process(_: int) -> _Renderer:
    return _Renderer()
