"""Chat templates of somebody else's: transformers' text, under limits."""

from __future__ import annotations

import time
from typing import Any

import pytest

from merge_cli.evaluation import chat
from merge_cli.evaluation.chat import TemplateError, render_chat
from merge_cli.recipe.tokenizer import BUILT_IN

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Grüße, <b>& "how"?'},
    {"role": "assistant", "content": "Fine.", "tool_calls": [{"function": {"name": "f"}}]},
]
FEATURES = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}"
    "{% generation %}{{ m | tojson }}{% endgeneration %}{% set ns = namespace(n=1) %}\n"
    "    {%- if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"
    "{% endfor %}{{ strftime_now('%%') }}{% if tools %}{{ tools }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip


@pytest.mark.parametrize("template", [*BUILT_IN.values(), FEATURES])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_transformers(tokenizer: Any, template: str, prompt: bool) -> None:
    tokenizer.chat_template = template
    theirs = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(tokenizer, MESSAGES, add_generation_prompt=prompt) == theirs


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'a' * 10**10 }}", "memory"),  # folded while it is compiled
        ("{{ messages[0].content * 10**10 }}", "memory"),
        ("{{ 'a'.ljust(10**11) }}", "memory"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "nests without end"),
        ("{{ '%1000000000000d' % 1 }}", "asks for too much|memory"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nests without end"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages", "end of print statement"),
        ("{{ 'ab' * (40 * 2**20) }}", "writes more than 64 MiB"),
        ("x" * 1_100_000, "1100000 characters"),
    ],
)
def test_what_a_template_may_not(tokenizer: Any, template: str, why: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=why):
        render_chat(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",  # one operation, that no signal interrupts inside Python
    ],
)
def test_a_template_that_does_not_end_is_ended(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    tokenizer.chat_template = template
    began = time.process_time()
    with pytest.raises(TemplateError, match="does not end within 0.5 seconds"):
        render_chat(tokenizer, MESSAGES)
    assert time.process_time() - began < 0.4  # it is another process that worked
    tokenizer.chat_template = "{{ messages | length }}"
    assert render_chat(tokenizer, MESSAGES) == "3"  # by a new process


def test_a_tokenizer_that_writes_by_itself_is_asked() -> None:
    class Own:
        chat_template = "{{ 1 }}"

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            if not messages:
                raise KeyError("no messages")
            return f"{len(messages)} {options['add_generation_prompt']}"

    assert render_chat(Own(), MESSAGES, add_generation_prompt=True) == "3 True"
    with pytest.raises(TemplateError, match="no messages"):
        render_chat(Own(), [])
