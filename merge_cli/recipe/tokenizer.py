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

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from merge_cli.recipe.forms import MappingOf, Plain, Text, any_of
from merge_cli.recipe.models import ModelForm
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.sections import Key, Section
from merge_cli.system.chat_templates import MAX_TEMPLATE, template_error
from merge_cli.system.untrusted import Unreadable, read_text

UNION, BASE = "union", "base"
MAX_PADDING = 2**20  # no embedding is padded to nearly as many rows


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


@dataclass(frozen=True)
class SourceForm(Form):
    """Whose vocabulary: union, base, or a model; the word that says so."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if node.value in (UNION, BASE):
            return node.value
        model = _MODEL.read(node, key, reader)
        return REFUSED if model is REFUSED else str(model)

    def schema(self) -> Schema:
        return any_of({"enum": [UNION, BASE]}, _MODEL.schema())


_MODEL = ModelForm("must name a model")
_KIND = Key(Plain(Literal["zero", "model_token"]), "zeros, or the row of another token")


def _model_token(values: dict[str, Any], node: Node, key: str, reader: Reader) -> Any:
    if ("token" in node.value) == ("token_id" in node.value):
        return reader.refuse(node, key, "give either token or token_id")
    return REFUSED if len(values) < len(node.value) else values


_ZERO = Section({"kind": _KIND})
_MODEL_TOKEN = Section(
    {
        "kind": _KIND,
        "model": Key(_MODEL, "the model that has it", required=True),
        "token": Key(Plain(str), "the token, as the tokenizer spells it"),
        "token_id": Key(Plain(int, 0), "or its number"),
    },
    _model_token,
    rules={"oneOf": [{"required": ["token"]}, {"required": ["token_id"]}]},
)


@dataclass(frozen=True)
class RowForm(Form):
    """What fills a token's rows, as fields of `TokenRule`."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if not isinstance(node.value, dict) or "kind" not in node.value:
            model = _MODEL.read(node, key, reader)
            return REFUSED if model is REFUSED else {"model": model}
        kind = _KIND.form.read(node.value["kind"], f"{key}.kind", reader)
        if kind is REFUSED:
            return REFUSED
        values = (_ZERO if kind == "zero" else _MODEL_TOKEN).read(node, key, reader)
        if values is REFUSED:
            return REFUSED
        given = {name: value for name, value in values.items() if name != "kind"}
        return {"zero": True} if kind == "zero" else given

    def schema(self) -> Schema:
        zero, token = _ZERO.schema(), _MODEL_TOKEN.schema()
        zero = {**zero, "properties": {"kind": {"const": "zero"}}, "required": ["kind"]}
        token["properties"]["kind"] = {"const": "model_token"}
        return any_of(_MODEL.schema(), zero, {**token, "required": ["kind", "model"]})


_RULE = Section(
    {
        "source": Key(RowForm(), "a model that has the token; or {kind: zero} for zeros"),
        "force": Key(Plain(bool), "also in models that have rows of their own", False),
    }
)


@dataclass(frozen=True)
class RuleForm(Form):
    """What fills the rows of one token."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if node.value is None:
            return TokenRule(key)
        if not isinstance(node.value, dict):
            hint = "Write {source: MODEL}, with `force: true` if its own rows are not wanted."
            return reader.refuse_type(node, key, "must be a mapping", hint)
        values = _RULE.read(node, key, reader)
        return TokenRule(key, force=values.get("force", False), **values.get("source", {}))

    def schema(self) -> Schema:
        return any_of(_RULE.schema(), {"type": "null"})


def _tokenizer(values: dict[str, Any], node: Node, key: str, reader: Reader) -> TokenizerSpec:
    if values.get("truncate"):
        if len(node.value) > 1:
            message = "stands beside keys that match rows by token."
            hint = "Leave one or the other out."
            reader.refuse(node.value["truncate"], f"{key}.truncate", message, hint)
        return TokenizerSpec(key=key, truncate=True)
    return TokenizerSpec(
        values.get("source", UNION),
        values.get("tokens", {}),
        values.get("pad_to_multiple_of"),
        f"{key}.source" if "source" in node.value else key,
    )


_SECTION = Section(
    {
        "source": Key(SourceForm(), "union, base, or one of the models", UNION),
        "tokens": Key(
            MappingOf(RuleForm(), "must be a mapping of tokens"),
            "what fills a token's rows in models that lack it",
        ),
        "pad_to_multiple_of": Key(
            Plain(int, 1, MAX_PADDING), "the output's rows are padded to a multiple of this"
        ),
        "truncate": Key(
            Plain(bool), "cut every model to the rows of the smallest; tokens are not matched"
        ),
    },
    _tokenizer,
    rules={
        "if": {"properties": {"truncate": {"const": True}}, "required": ["truncate"]},
        "then": {"maxProperties": 1},
    },
)


@dataclass(frozen=True)
class TokenizerForm(Form):
    """The section, or the word that is its `source`."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        if isinstance(node.value, str) and node.value:
            return TokenizerSpec(node.value, key=key)
        if not isinstance(node.value, dict):
            hint = "Write `tokenizer: {source: union}`."
            return reader.refuse_type(node, key, "must be a mapping", hint)
        return _SECTION.read(node, key, reader)

    def schema(self) -> Schema:
        return any_of({"type": "string", "minLength": 1}, _SECTION.schema())


@dataclass(frozen=True)
class TemplateForm(Form):
    """auto, a built-in name, a .jinja file beside the recipe, or Jinja; the template's text."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        word = Text().read(node, key, reader)
        if word is REFUSED or word == AUTO:
            return word
        text = template_text(word, reader.folder)
        if text is not None:
            error = template_error(text)
            return reader.refuse(node, key, f"not valid Jinja: {error}") if error else text
        message = f"no template of that name, and no such file: {word}."
        hint = f"Use auto, {', '.join(BUILT_IN)}, or Jinja."
        return reader.refuse(node, key, message, hint)

    def schema(self) -> Schema:
        words = {"enum": [AUTO, *BUILT_IN]}
        return any_of(words, {"type": "string", "pattern": r"\.jinja$|\{"})


AUTO = "auto"
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


def template_text(template: str, folder: Path) -> str | None:
    """The text that a recipe's `chat_template` names; None for `auto`, or for a word that is none.

    Args:
        template: auto, a built-in name, a path of a .jinja file beside the recipe, or Jinja itself.
    """
    if template in BUILT_IN:
        return BUILT_IN[template]
    if template.endswith(".jinja") and "\n" not in template and "{" not in template:
        path = folder / template
        try:
            return read_text(path, limit=MAX_TEMPLATE)
        except Unreadable:
            return None
    return template if "{" in template else None
