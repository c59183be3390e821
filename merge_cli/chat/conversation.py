"""What a model has been asked and has answered, as the tokens that it reads next.

With a chat template the whole conversation is rendered again for each question. Without one, or
where the user wants none, a model continues text: each line stands by itself, without history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_cli.chat.answers import Sampling
from merge_cli.errors import SourceError, UsageError
from merge_cli.evaluation.chat import TemplateError, render_chat
from merge_cli.evaluation.tokens import encode_pair, first_unknown, row_start

Message = Mapping[str, Any]


class Conversation:
    """A conversation with one model.

    Args:
        label: the model, for messages.
        context: tokens that it reads and writes at most.
        entries: number of its embeddings; None does not look for tokens without one.
        template: whether to write messages with the tokenizer's template.
        system: what the conversation begins with.

    Raises:
        UsageError: a system message, and no template to write it with.
    """

    def __init__(
        self,
        label: str,
        tokenizer: Any,
        *,
        context: int,
        entries: int | None,
        template: bool,
        system: str = "",
    ) -> None:
        self.label, self.tokenizer = label, tokenizer
        if system and not template:
            raise UsageError("a system message needs a chat template", where=label)
        self._context, self._entries, self._template = context, entries, template
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []
        self.answered = 0

    @property
    def has_history(self) -> bool:
        """Whether earlier turns are part of the next prompt."""
        return self._template

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns, self.answered = [], 0

    def prompt(self, question: str, sampling: Sampling) -> tuple[list[int], int]:
        """The tokens to continue, and how many of the oldest turns were left out to make room.

        An answer gets room for `max_tokens`, or half of the context if that is less.

        Raises:
            UsageError: the question alone is too long.
            SourceError: the template refuses it; a token without an embedding.
        """
        turns = self._turns
        while True:
            messages = [*self._system, *turns, {"role": "user", "content": question}]
            ids = self.tokens(messages if self._template else question)
            if len(ids) <= self._limit(sampling):
                dropped = (len(self._turns) - len(turns)) // 2
                self._turns = turns
                return ids, dropped
            if not turns:
                raise self._too_long(ids, sampling)
            turns = turns[2:]

    def messages(self, messages: Sequence[Message], sampling: Sampling) -> list[int]:
        """The tokens to continue after messages of the user's own.

        Raises:
            UsageError: they are too long, or there is no template to write them with.
            SourceError: the template refuses them; a token without an embedding.
        """
        if not self._template:
            hint = "Use `prompt`, a text to continue."
            raise UsageError("has messages, and no chat template to write them with", hint=hint)
        ids = self.tokens(messages)
        if len(ids) > self._limit(sampling):
            raise self._too_long(ids, sampling)
        return ids

    def _limit(self, sampling: Sampling) -> int:
        return max(self._context - sampling.max_tokens, self._context // 2)

    def _too_long(self, ids: Sequence[int], sampling: Sampling) -> UsageError:
        message = f"the prompt has {len(ids):,} tokens, and {self._limit(sampling):,} fit"
        hint = "Ask for less at once, or lower --max-tokens."
        return UsageError(f"{message} before the answer", where=self.label, hint=hint)

    def tokens(self, asked: str | Sequence[Message]) -> list[int]:
        """Tokens of a text to continue, or of messages as the template writes them.

        Raises:
            SourceError: the template refuses the messages; a token without an embedding; nothing.
        """
        if isinstance(asked, str):
            text, start = asked, row_start(self.tokenizer)
        else:
            start = []
            try:
                text = render_chat(self.tokenizer, asked, add_generation_prompt=True)
            except TemplateError as error:
                message = f"the chat template refuses it: {error}"
                raise SourceError(message, model=self.label) from None
        try:
            text.encode()
        except UnicodeEncodeError:
            message = "the text holds half of a surrogate pair"
            raise SourceError(message, model=self.label) from None
        ids = list(encode_pair(text, "", self.tokenizer, start).ids)
        if not ids:
            message = "an empty prompt, and the tokenizer has no token to start with"
            raise SourceError(message, model=self.label)
        unknown = None if self._entries is None else first_unknown(ids, self._entries)
        if unknown is not None:
            token = self.tokenizer.convert_ids_to_tokens(unknown)
            message = f"its token {token!r} has the number {unknown}, and it has no embedding"
            hint = "The tokenizer is not this model's."
            raise SourceError(message, model=self.label, hint=hint)
        return ids

    def add(self, question: str, text: str) -> None:
        """Remember a question and its answer."""
        self.answered += 1
        if self._template:
            self._turns = [
                *self._turns,
                {"role": "user", "content": question},
                {"role": "assistant", "content": text},
            ]
