"""Chat templates by name, and what a recipe's `chat_template` may be."""

from __future__ import annotations

from pathlib import Path

from merge_cli.guarded import Unreadable, read_text

AUTO = "auto"
MAX_TEMPLATE = 2**20  # the longest in the wild have 30,000 characters
# Each renders what mergekit's template of the same name does, line breaks and blanks included.
BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "alpaca": (
        "{% set heads = {'user': 'Instruction', 'assistant': 'Response',"
        " 'user_context': 'Input'} %}"
        "{% set system = messages | selectattr('role', 'equalto', 'system') | list %}"
        "{{ (system | last)['content'] | trim if system else '' }}{{ '\\n\\n' }}"
        "{% for message in messages %}{% if message['role'] in heads %}"
        "{{ '### ' + heads[message['role']] + ':\\n' + message['content'] | trim }}"
        "{{ '' if loop.last else '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
        "{{ '### Response:\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token if messages else '' }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
        "{% set turns = messages if system is none else messages[1:] %}{{ bos_token }}"
        "{% for turn in turns %}"
        "{% if turn['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
        "{{ raise_exception('user and assistant must take turns, after a first system message') }}"
        "{% elif loop.index0 % 2 %}{{ ' ' + turn['content'] + eos_token }}{% else %}"
        "{{ ' [INST] ' + (system + '\\n\\n' if loop.first and system is not none else '') }}"
        "{{ turn['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "exaone": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ ' ' * 8 + '[|system|][|endofturn|]\\n\\n' }}{% endif %}"
        "{{ ' ' * 4 + '[|' + message['role'] + '|]' + message['content'] + '\\n' + ' ' * 8 }}"
        "{{ ('' if message['role'] == 'user' else '[|endofturn|]') + '\\n\\n' }}{% endfor %}"
        "{{ ' ' * 4 + '[|assistant|]\\n' if add_generation_prompt else '' }}"
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
