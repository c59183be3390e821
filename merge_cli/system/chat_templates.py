"""Whether transformers can compile a chat template. Nothing of it is run.

transformers compiles with Jinja's sandbox, its loop controls, and a block of its own, `generation`.
Jinja computes constants while it compiles, and those of a stranger's template may be as large as
they like: here every operator and filter is a stand-in that computes nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

MAX_TEMPLATE = 2**20  # the longest in the wild have 30,000 characters


@lru_cache(maxsize=64)
def template_error(text: str) -> str:
    """Why a template cannot be compiled, with its line; empty where it can."""
    if len(text) > MAX_TEMPLATE:
        return f"it has {len(text)} characters (at most {MAX_TEMPLATE})"
    from jinja2 import TemplateSyntaxError

    try:
        compile(_environment().compile(text, raw=True), "<chat template>", "exec")
    except TemplateSyntaxError as error:  # also of filters and tests that do not exist
        return f"{str(error.message).rstrip('.')} (line {error.lineno} of the template)"
    except (RecursionError, MemoryError):
        return "it nests too deeply"
    except (SyntaxError, ValueError, OverflowError) as error:  # of the Python that Jinja makes
        return str(error).partition(" (")[0]
    return ""


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: what the model has written, in a conversation to train on."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    class Environment(ImmutableSandboxedEnvironment):
        """Operators that are intercepted are not computed while a template is compiled."""

        intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
        intercepted_unops = frozenset(ImmutableSandboxedEnvironment.default_unop_table)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    for names in (environment.filters, environment.tests):
        names.update(dict.fromkeys(names, _not_computed))
    return environment


def _not_computed(*_: Any, **__: Any) -> Any:
    """Instead of a filter or a test, of which only constants are computed while compiling.

    Raises:
        Impossible: Jinja's own word for a constant that is left to those who run the template.
    """
    from jinja2.nodes import Impossible

    raise Impossible
