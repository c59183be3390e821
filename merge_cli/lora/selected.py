"""Which modules an adapter's config selects, as PEFT reads it.

PEFT wraps what the config selects, and then loads the adapter's tensors by name. A tensor of a
module that is not wrapped is left out without a word. So the config decides, not the tensors.

    target_modules         names, each the end of a module's behind a dot; or one expression
    exclude_modules        the same: what is not wrapped all the same
    layers_to_transform    numbers of layers, behind `layers_pattern` or any name
    modules_to_save        names, each the end of a module's: replaced, and not wrapped
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from merge_cli.errors import SourceError
from merge_cli.lora.config import CONFIG
from merge_cli.lora.heads import HEADS
from merge_cli.system.patterns import compile_pattern
from merge_cli.system.untrusted import Unreadable

_ALL = "all-linear"


class SelectedModules:
    """The modules that get factors, and those that are replaced.

    Args:
        config: checked by `config.read_config`.

    Attributes:
        listed: what `target_modules` names; none where it is an expression.
        saved: what `modules_to_save` names.
        by_default: whether the config names nothing: PEFT has a default for each architecture.
        by_kind: whether all linear layers are selected, which names do not tell.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        targets = config.get("target_modules")
        self.saved: list[str] = config.get("modules_to_save") or []
        self.listed: list[str] = targets if isinstance(targets, list) else []
        self.by_default = targets is None and not config.get("target_parameters")
        self.by_kind = isinstance(targets, str) and targets.lower() == _ALL
        self._is_target = _matcher(targets)
        self._is_parameter = _matcher(config.get("target_parameters"))
        self._is_excluded = _matcher(config.get("exclude_modules"))
        self._names_saved = frozenset(filter(_is_plain, self.saved))
        self._rules_saved = [rf"(^|.*\.){x}($|\..*)" for x in self.saved if not _is_plain(x)]
        layers = config.get("layers_to_transform")
        self._layers = [layers] if isinstance(layers, int) else layers or []
        patterns = config.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        self._number = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in patterns]
        self._number = self._number or [r".*?\.[^.]*\.(\d+)\."]

    @property
    def by_name(self) -> bool:
        """Whether names alone tell which modules are selected."""
        return not self.by_default and not self.by_kind

    def why_not(self, module: str, *, is_embedding: bool = False) -> str:
        """Why PEFT puts no factors on a module; empty where it does.

        Raises:
            SourceError: an expression that takes too long.
        """
        try:
            return self._why_not(module, is_embedding)
        except Unreadable as error:
            hint = "Write the modules' names out."
            raise SourceError(
                f"an expression for modules {error}", file=CONFIG, hint=hint
            ) from None

    def _why_not(self, module: str, is_embedding: bool) -> str:
        if self._is_parameter(f"{module}.weight"):
            return ""
        if self._is_excluded(module):
            return "exclude_modules in adapter_config.json names it"
        if self._is_in_saved(module):
            return "modules_to_save in adapter_config.json names it"
        if self.by_default:
            return ""
        if self.by_kind:
            ends = is_embedding or module.rpartition(".")[2] in HEADS
            return "target_modules in adapter_config.json is all-linear, which it is not" * ends
        if not self._is_target(module):
            return "target_modules in adapter_config.json does not name it"
        if not self._layers or module in self.listed or self._layer(module) in self._layers:
            return ""
        return "layers_to_transform in adapter_config.json leaves it out"

    def _is_in_saved(self, module: str) -> bool:
        """Whether it is a module that is replaced, or one inside of such a module."""
        if not self.saved:
            return False
        parts = module.split(".")
        ends = range(1, len(parts) + 1)
        spans = (".".join(parts[i:j]) for j in ends for i in range(j))
        plain = not self._names_saved.isdisjoint(spans)
        return plain or any(compile_pattern(rule).match(module) for rule in self._rules_saved)

    def _layer(self, module: str) -> int | None:
        """The number of a module's layer: the first one in its name."""
        matches = (compile_pattern(pattern).match(module) for pattern in self._number)
        first = next((match for match in matches if match), None)
        return int(first.group(1) or 0) if first else None


def _is_plain(name: str) -> bool:
    """Whether an expression is a name as it stands."""
    return re.fullmatch(r"[\w.-]+", name) is not None


def _matcher(names: Any) -> Callable[[str], bool]:
    """Whether a module is one of these names, or an expression means it."""
    if isinstance(names, str) and names:
        return lambda module: compile_pattern(names).fullmatch(module) is not None
    listed = frozenset(names or ())
    if not listed:
        return lambda module: False
    return lambda module: not listed.isdisjoint(name_ends(module))


def name_ends(module: str) -> list[str]:
    """A name, and what is behind each of its dots."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
