"""The `tokenizer:` section: which vocabulary the output has, and what fills a token's rows.

    tokenizer:
      source: union                 # base, or one of the models
      tokens:
        <|im_start|>: {source: ./chat, force: true}
        <pad>: {source: {kind: zero}}
        <|new|>: {source: {kind: model_token, model: ./chat, token: "<|im_start|>"}}
      pad_to_multiple_of: 64

`tokenizer_source: X`, and `tokenizer: X`, are the same as `tokenizer: {source: X}`.
`tokenizer: {truncate: true}` cuts every model to the rows of the smallest one instead.

Chat templates by name, and what a recipe's `chat_template` may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.recipe.fields import nearest
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.system.untrusted import Unreadable, read_text

UNION, BASE = "union", "base"
MAX_PADDING = 2**20  # no embedding is padded to nearly as many rows
Add = Callable[[Node, str, str, str], None]  # node, key, what, hint


@dataclass(frozen=True)
class TokenRule:
    """What fills the rows of one token, in models that lack it (in all, with `force`).

    Attributes:
        zero: zeros.
        model: a model's row: of the same token, or of `token` or `token_id`.
        key: where it stands in the recipe.
    """

    key: str
    zero: bool = False
    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """The section.

    Attributes:
        source: union, base, or a model as written.
        key: where the source stands.
        truncate: rows are not matched by token but by number, as far as all models have them.
    """

    source: str = UNION
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    key: str = "tokenizer_source"
    truncate: bool = False


def parse_tokenizer(
    section: Node | None,
    source: Node | None,
    folder: Path,
    add: Add,
    places: dict[str, tuple[int, int]],
) -> TokenizerSpec | None:
    """The section, or the short form; both together are a problem.

    Args:
        add: told of each problem.
        places: filled with where keys stand, for messages of later stages.
    """
    if source is not None and source.value is not None:
        if section is not None:
            add(source, "tokenizer_source", "stands beside `tokenizer`.", "Leave one of them out.")
        if isinstance(source.value, str) and source.value:
            return TokenizerSpec(source.value)
        add(source, "tokenizer_source", f"must be text (got {source.plain()!r})", "")
        return None
    if section is None or section.value is None:
        return None
    if isinstance(section.value, str) and section.value:
        return TokenizerSpec(section.value, key="tokenizer")
    if not isinstance(section.value, dict):
        message = f"must be a mapping (got {section.plain()!r})"
        add(section, "tokenizer", message, "Write `tokenizer: {source: union}`.")
        return None
    known = ("source", "tokens", "pad_to_multiple_of", "truncate")
    for name in section.value:
        places[f"tokenizer.{name}"] = section.key_places[name]
        if name not in known:
            _unknown(section, name, "tokenizer", known, add)
    cut = section.value.get("truncate")
    if cut is not None and cut.value is not None:
        if not isinstance(cut.value, bool):
            add(cut, "tokenizer.truncate", f"must be true or false (got {cut.plain()!r})", "")
        elif cut.value and len(section.value) > 1:
            message = "stands beside keys that match rows by token."
            add(cut, "tokenizer.truncate", message, "Leave one or the other out.")
        elif cut.value:
            return TokenizerSpec(key="tokenizer", truncate=True)
    named = section.value.get("source")
    word = UNION
    if named is not None:
        result = _model(named, "tokenizer.source", folder, add)
        word = str(result) if result is not None else UNION
        if isinstance(named.value, str) and named.value in (UNION, BASE):
            word = named.value
    size = section.value.get("pad_to_multiple_of")
    multiple = None
    if size is not None and size.value is not None:
        if type(size.value) is int and 1 <= size.value <= MAX_PADDING:
            multiple = size.value
        else:
            message = f"must be a whole number from 1 to {MAX_PADDING} (got {size.plain()!r})"
            add(size, "tokenizer.pad_to_multiple_of", message, "")
    tokens = section.value.get("tokens")
    rules: dict[str, TokenRule] = {}
    if tokens is not None and tokens.value is not None:
        if isinstance(tokens.value, dict):
            for token, node in tokens.value.items():
                places[f"tokenizer.tokens.{token}"] = tokens.key_places[token]
                rule = _rule(node, f"tokenizer.tokens.{token}", folder, add)
                if rule is not None:
                    rules[str(token)] = rule
        else:
            message = f"must be a mapping of tokens (got {tokens.plain()!r})"
            add(tokens, "tokenizer.tokens", message, "")
    return TokenizerSpec(word, rules, multiple, "tokenizer.source" if named else "tokenizer")


def _rule(node: Node, key: str, folder: Path, add: Add) -> TokenRule | None:
    if node.value is None:
        return TokenRule(key)
    if not isinstance(node.value, dict):
        hint = "Write {source: MODEL}, with `force: true` if its own rows are not wanted."
        add(node, key, f"must be a mapping (got {node.plain()!r})", hint)
        return None
    for name in node.value:
        if name not in ("source", "force"):
            _unknown(node, name, key, ("source", "force"), add)
    force = node.value.get("force")
    if force is not None and not isinstance(force.value, bool):
        add(force, f"{key}.force", f"must be true or false (got {force.plain()!r})", "")
    forced = bool(force is not None and force.value is True)
    source = node.value.get("source")
    if source is None or source.value is None:
        return TokenRule(key, force=forced)
    place = f"{key}.source"
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return TokenRule(key, model=_model(source, place, folder, add), force=forced)
    kind = source.value["kind"].value
    parts = {name: child for name, child in source.value.items() if name != "kind"}
    if kind == "zero":
        for name in parts:
            _unknown(source, name, place, ("kind",), add)
        return TokenRule(key, zero=True, force=forced)
    if kind != "model_token":
        message = f"must be zero or model_token (got {kind!r})"
        add(source, f"{place}.kind", message, nearest(str(kind), ("zero", "model_token")))
        return None
    for name in parts:
        if name not in ("model", "token", "token_id"):
            _unknown(source, name, place, ("kind", "model", "token", "token_id"), add)
    model = _model(parts["model"], f"{place}.model", folder, add) if "model" in parts else None
    if "model" not in parts:
        add(source, f"{place}.model", "missing", "")
    token, number = parts.get("token"), parts.get("token_id")
    if (token is None) == (number is None):
        add(source, place, "give either token or token_id", "")
        return None
    if token is not None and not isinstance(token.value, str):
        add(token, f"{place}.token", f"must be text (got {token.plain()!r})", "")
        return None
    if number is not None and not (type(number.value) is int and number.value >= 0):
        add(number, f"{place}.token_id", f"must be a token's number (got {number.plain()!r})", "")
        return None
    return TokenRule(
        key,
        model=model,
        token=token.value if token else None,
        token_id=number.value if number else None,
        force=forced,
    )


def _model(node: Node, key: str, folder: Path, add: Add) -> ModelRef | None:
    value = node.value
    if isinstance(value, dict):  # mergekit's long form
        inner: Any = value.get("model", node)
        parts = inner.value if isinstance(inner.value, dict) else {"path": inner}
        path, revision = parts.get("path"), parts.get("revision")
        if path is not None and isinstance(path.value, str):
            word = f"{path.value}@{revision.value}" if revision and revision.value else path.value
            return parse_reference(word, folder)
    if isinstance(value, str) and value:
        return parse_reference(value, folder)
    add(node, key, f"must name a model (got {node.plain()!r})", "")
    return None


def _unknown(node: Node, name: str, key: str, known: tuple[str, ...], add: Add) -> None:
    line, column = node.key_places[name]
    add(Node(None, line, column), f"{key}.{name}", "unknown key.", nearest(name, known))


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
