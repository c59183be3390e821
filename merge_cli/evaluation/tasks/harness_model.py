"""A loaded model for lm-evaluation-harness: with our tokens, and a count of what it cuts."""

from __future__ import annotations

from typing import Any

from merge_cli.evaluation.chat import render_chat
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.tokens import without_ending


def harness_model(live: LiveModel) -> Any:
    """The harness's model, with `asked` and `cut`: requests, and how many were longer than fits.

    A tokenizer that adds a token after every text is replaced by one that does not: the harness
    finds where a continuation begins by the length of its context, which would count that token.
    """
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):  # type: ignore[misc]  # the harness has no types
        asked = cut = 0

        def _loglikelihood_tokens(self, requests: Any, *rest: Any, **named: Any) -> Any:
            room = self.max_length + 1
            self.asked += len(requests)
            self.cut += sum(len(before) + len(after) > room for _, before, after in requests)
            return super()._loglikelihood_tokens(requests, *rest, **named)

        def tok_batch_encode(
            self,
            strings: Any,
            padding_side: str = "left",
            left_truncate_len: Any = None,
            truncation: bool = False,
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
            self.asked += len(strings)
            if not left_truncate_len:
                return ids, mask
            self.cut += int((mask.sum(1) > left_truncate_len).sum())
            return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            text = render_chat(
                self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt
            )
            if add_generation_prompt:
                return text
            # The last message is the beginning of an answer: the end of a message is left out.
            start = str(chat_history[-1]["content"]).strip()
            return text[: text.rindex(start) + len(start)] if start in text else text

    return Counting(
        pretrained=live.net,
        tokenizer=without_ending(live.tokenizer),
        max_length=live.max_length,
        batch_size=max(1, live.batch_tokens // live.max_length),
    )
