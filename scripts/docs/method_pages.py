"""A page for each registered method: from its docstring and signature, with its example."""

from __future__ import annotations

import inspect
import re

from merge_cli.methods.method import Method
from merge_cli.methods.parameters import MethodParameter
from merge_cli.methods.registry import all_methods
from merge_cli.recipe.examples import example_recipe

_ARXIV = re.compile(r"arXiv:(\d+\.\d+)")


def method_pages() -> dict[str, str]:
    """Method -> the Markdown of its page, in the registry's order."""
    return {method.name: method_page(method) for method in all_methods()}


def method_page(method: Method) -> str:
    """One method's page."""
    summary, text = _docstring(method)
    lines = [f"# {method.name}", "", _escaped(summary), ""]
    if text:
        lines += [_escaped(text), ""]
    lines += [_needs(method), ""]
    if method.paper:
        lines += [f"Paper: {_linked(method.paper)}.", ""]
    if method.parameters:
        lines += [
            "## Parameters",
            "",
            "| name | values | default | scope | |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(parameter) for parameter in method.parameters.values()]
        lines += [""]
    if method.preparation:
        lines += [_PREPARATIONS[method.preparation], ""]
    example = example_recipe({method.name, *method.aliases})
    if example:
        name, recipe = example
        lines += ["## Example", "", f"`configs/{name}`:", "", "```yaml", recipe.rstrip(), "```", ""]
    lines += ["The formula, and where implementations differ: [methods](../methods.md).", ""]
    return "\n".join(lines)


_PREPARATIONS = {
    "learning": "How it learns is set under `training`: [learned coefficients](../dam.md).",
    "calibration": "How examples are looked at: [statistics](../statistics.md).",
    "automatic": "What is tried, and how it is measured: [automatic](../auto.md).",
    "search": "What is searched and scored: [searching](../evolve.md).",
}


def _docstring(method: Method) -> tuple[str, str]:
    """The first line and what follows it, without the sections on arguments and results."""
    summary, _, rest = (inspect.getdoc(method.function) or "").partition("\n")
    return summary, re.split(r"^(?:Args|Returns|Raises):$", rest, flags=re.MULTILINE)[0].strip()


def _needs(method: Method) -> str:
    least, most = method.count
    many = f"exactly {least}" if least == most else f"{least} or more"
    base = "a base model and " if method.needs_base else ""
    models = f"{many} model{'s' * (least != 1 or most is None)}"
    also = f" Also called {', '.join(f'`{a}`' for a in method.aliases)}." if method.aliases else ""
    return f"Needs {base}{models}.{also}"


def _row(parameter: MethodParameter) -> str:
    default = parameter.default
    shown = "follows" if default is None else f"`{_yaml(default)}`"
    scope = "each model" if parameter.per_model else "the merge"
    cells = [f"`{parameter.name}`", parameter.allowed, shown, scope, _escaped(parameter.doc)]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _escaped(text: str) -> str:
    """Formulas as they are: `*` and `_` of a docstring are no Markdown."""
    return re.sub(r"([*_<])", r"\\\1", text)


def _linked(paper: str) -> str:
    return _ARXIV.sub(lambda m: f"[arXiv:{m[1]}](https://arxiv.org/abs/{m[1]})", paper)
