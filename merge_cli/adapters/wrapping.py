"""How PEFT wraps a model that it loads an adapter onto, and what its tensors are called then.

    a layer with factors      MODULE.base_layer.bias, and whatever else the layer holds
    a module saved in full    MODULE.weight: everything that it holds, or PEFT cannot load it
    everything else           MODULE.bias: overwritten in the model itself

What has another name is left out without a word. PEFT finds modules by the ends of their names:
layers behind a dot, modules that are saved anywhere (`norm` is `layers.0.input_layernorm`, too).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping

from merge_cli.adapters.pair import Module, ModuleParameter

_LAST = chr(0x10FFFF)
# Models whose layers of these names compute with the weight alone, so that PEFT refuses factors.
_FUSED_MODELS = frozenset(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"))
_FUSED_LAYERS = frozenset(("conv1d", "out_proj"))


def takes_factors(module: str, model_type: object) -> bool:
    """Whether PEFT puts factors on a layer."""
    return model_type not in _FUSED_MODELS or module.rpartition(".")[2] not in _FUSED_LAYERS


class Wrapping:
    """A model as PEFT wraps it.

    Args:
        modules: all of the model's, by name.
        factored: modules that get factors.
        stacks: modules whose parameters get factors, as experts do.
    """

    def __init__(
        self,
        modules: Mapping[str, Module],
        factored: Collection[str],
        stacks: Collection[str] = (),
    ) -> None:
        self._modules, self._listed = modules, tuple(factored)
        self._factored, self._stacks = frozenset(factored), frozenset(stacks)
        self._reversed = sorted(name[::-1] for name in modules)

    def name_of(self, parameter: ModuleParameter) -> str:
        """What a tensor that is saved is called in an adapter."""
        inside = ".base_layer" if parameter.module in self._factored else ""
        return f"{parameter.module}{inside}.{parameter.name}"

    def targets(self) -> list[str] | str:
        """What `target_modules` says: the modules that get factors, and no others.

        An expression where the end of another module's name is that of one of them.
        """
        if all(self._ending(f".{name}") <= self._factored for name in self._listed):
            return list(self._listed)
        return "|".join(map(re.escape, self._listed))

    def saved_with(self, module: str) -> list[str]:
        """Every module that PEFT takes for one that is saved, itself among them."""
        return sorted(self._ending(module))

    def keeps_factors(self, layer: str, saved: str) -> bool:
        """Whether a layer can have factors where a module is saved."""
        # Names are expressions to PEFT here, and are not escaped.
        excluded = re.match(rf"(^|.*\.){saved}($|\..*)", layer)
        return not excluded and not layer.endswith(saved)

    def why_not_saved(self, module: str, at_hand: Collection[str]) -> str:
        """Why PEFT cannot load a module that is saved; empty where it can.

        Args:
            at_hand: the tensors that the files have, by transformers' names.
        """
        lost = next((n for n in self._listed if not self.keeps_factors(n, module)), "")
        if lost:
            return f"PEFT would leave out the factors of {lost} for it"
        for name in self.saved_with(module):
            holds = self._modules[name]
            of_this = "" if name == module else f": PEFT takes {name} for it, too"
            if holds.kind == "inner" or name in self._stacks:
                return f"a module that PEFT cannot save{of_this}"
            missing = sorted(t for t in holds.tensors if f"{name}.{t}" not in at_hand)
            if missing:
                return f"PEFT needs {name}.{missing[0]} for it, which is not in the files"
        return ""

    def _ending(self, text: str) -> frozenset[str]:
        """The modules whose names end with a text."""
        first = bisect_left(self._reversed, text[::-1])
        last = bisect_left(self._reversed, text[::-1] + _LAST)
        return frozenset(name[::-1] for name in self._reversed[first:last])
