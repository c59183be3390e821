"""What transformers can compile passes, and nothing else; no constant of a template is computed."""

from __future__ import annotations

import time
from importlib import import_module

import pytest
from jinja2 import TemplateError

from merge_cli.recipe.tokenizer import BUILT_IN
from merge_cli.system.chat_templates import MAX_TEMPLATE, template_error

VALID = [
    *BUILT_IN.values(),
    "no template at all, { nor }",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{% for m in messages %}{% if m.x %}{% continue %}{% endif %}{% break %}{% endfor %}",
    "{% macro f(x, y=1) -%}{{ x ~ y }}{%- endmacro %}{{ f('a')|tojson(indent=2) }}",
    "{%- set ns = namespace(n=0) -%}{% set ns.n = ns.n + 1 %}{{ raise_exception('no') }}",
    "{{ strftime_now('%d') }}{{ dict(a=1).a }}{{ x is defined and x is not none }}",
    "{% if x %}{{ x|nothing_like_it }}{% endif %}",  # an error where it is rendered, if ever
    "{% call(x) f() %}{{ x }}{% endcall %}{% filter upper %}a{% endfilter %}",
]
INVALID = [
    "{{ x",
    "{% if %}",
    "{% if x %}",
    "{% endif %}",
    "{{ x }",
    "{% for x %}{% endfor %}",
    "{% generation %}",
    "{% do x.append(1) %}",
    "{% trans %}a{% endtrans %}",
    "{{ x|nothing_like_it }}",
    "{{ x is nothing_like_it }}",
    "{{ 'a }}",
    "{# x",
    "{% break %}",
    "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "{% for x in y %}" * 25 + "{% endfor %}" * 25,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
]
LARGE = [
    "{{ 10 ** 10 ** 10 }}",
    "{{ -(10 ** 10 ** 10) }}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ 'a' * 99999999999 }}",
    "{{ [0] * 99999999999 }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ 'a'|center(99999999999) }}",
    "{{ 'a'|indent(99999999999)|upper }}",
    "{% if 10 ** 10 ** 10 %}{% endif %}",
    "{% set x = 'a' * 99999999999 %}",
    "{% for i in range(99999999999) %}{% endfor %}",
]


@pytest.mark.parametrize("text", VALID)
def test_what_transformers_compiles(text: str) -> None:
    assert template_error(text) == ""
    _compile(text)


@pytest.mark.parametrize("text", INVALID)
def test_what_it_does_not(text: str) -> None:
    assert template_error(text) != ""
    with pytest.raises((TemplateError, SyntaxError, RecursionError)):
        _compile(text)


@pytest.mark.parametrize("text", LARGE)
def test_constants_are_not_computed(text: str) -> None:
    begun = time.process_time()
    assert template_error(text) == ""
    assert time.process_time() - begun < 1


def test_no_time_is_spent_on_endless_templates() -> None:
    assert "at most" in template_error("{{ 1 }}" * MAX_TEMPLATE)


def test_the_line_is_named() -> None:
    assert "(line 3 of the template)" in template_error("a\nb\n{{ c }\n")
    assert "'nothing'" in template_error("{{ a|nothing }}")


def _compile(text: str) -> None:
    import_module("transformers.utils.chat_template_utils")._compile_jinja_template(text)
