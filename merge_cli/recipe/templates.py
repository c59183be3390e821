"""Chat templates by name, and what a recipe's `chat_template` may be."""

from __future__ import annotations

from pathlib import Path

from merge_cli.guarded import Unreadable, read_text

AUTO = "auto"
MAX_TEMPLATE = 2**20  # the longest in the wild have 30,000 characters
# Written from the formats' descriptions.
BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'user' %}### Instruction:\n"
        "{{ message['content'] }}\n\n{% elif message['role'] == 'assistant' %}### Response:\n"
        "{{ message['content'] }}\n\n{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
        "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "[INST] {{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %}"
        " {{ message['content'] }}{{ eos_token }}{% else %}{{ message['content'] }}\n\n{% endif %}"
        "{% endfor %}"
    ),
    "exaone": (
        "{% for message in messages %}[|{{ message['role'] }}|]{{ message['content'] }}"
        "{% if message['role'] != 'user' %}[|endofturn|]{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
}


def template_text(wanted: str, folder: Path) -> str | None:
    """The text that a recipe's `chat_template` names; None for `auto`, or for a word that is none.

    Args:
        wanted: auto, a built-in name, a path of a .jinja file beside the recipe, or Jinja itself.
    """
    if wanted in BUILT_IN:
        return BUILT_IN[wanted]
    if wanted.endswith(".jinja") and "\n" not in wanted and "{" not in wanted:
        place = folder / wanted
        try:
            return read_text(place, limit=MAX_TEMPLATE)
        except Unreadable:
            return None
    return wanted if "{" in wanted else None
