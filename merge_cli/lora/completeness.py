"""An adapter's tensors held against its config: what PEFT would leave out, and what is missing.

PEFT leaves a tensor out without a word, or cannot load the adapter    refused
PEFT warns, and the model stays as it is                               a note
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from merge_cli.checkpoint.tensors import Tensor
from merge_cli.lora.adapter import PREFIX, Parts
from merge_cli.lora.heads import HEADS, keeps_ties
from merge_cli.lora.selected import SelectedModules
from merge_cli.lora.targets import Targets, module_of

SAVE_AGAIN = "Save the adapter again with PEFT, or correct its adapter_config.json."
_SHOWN = 3  # names in a note
_EXPERT = re.compile(r"experts\.\d+\.")
_EMBEDDING = re.compile(r"emb|wte|wpe|shared")


class SavedModule(NamedTuple):
    """A module of the model that `modules_to_save` names, by `entry`.

    Attributes:
        missing: its tensors that the adapter does not hold.
        held: how many it holds.
    """

    name: str
    entry: str
    missing: tuple[str, ...]
    held: int


class Completeness:
    """What an adapter holds, compared with what its config says.

    Args:
        tensors: of the model, as they are without the adapter.
        config: the adapter's.
    """

    def __init__(
        self, targets: Targets, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> None:
        self._targets, self._tensors, self._config = targets, tensors, config
        self._selected = SelectedModules(config)
        self._saved = self._saved_modules()

    def refusals(self) -> Iterator[tuple[str, str]]:
        """What PEFT would leave out or fail at: a tensor or module, and why."""
        layers = self._targets.layers
        outside = {m: why for m, parts in layers.items() if (why := self._why_not(m, parts))}
        if outside:
            module, why = next(iter(outside.items()))
            others = f", and those of {len(outside) - 1} others" if len(outside) > 1 else ""
            yield module, f"{why}: PEFT leaves its factors out{others}"
        for name, stored in self._replacements():
            if ".base_layer." in stored and self._selected.by_name and not self._is_wrapped(name):
                yield stored, "adapter_config.json does not select its layer: PEFT leaves it out"
        held = {module.entry for module in self._saved if module.held}
        for saved in self._saved:
            if saved.missing and (saved.held or saved.entry not in held):
                message = f"modules_to_save names {saved.name}, and the adapter lacks it"
                yield saved.missing[0], f"{message}: PEFT cannot load the adapter"

    def notes(self) -> Iterator[str]:
        """What PEFT warns of, what it says nothing of, and what only an earlier PEFT loads."""
        if self._selected.by_default and self._targets.layers:
            yield (
                "adapter_config.json has no target_modules: PEFT goes by the architecture then; "
                "here all that the adapter has factors for is changed"
            )
        lacking = self._without_factors()
        if lacking:
            yield (
                f"adapter_config.json selects {_listed(lacking)}, and the adapter has no factors "
                "for that: it stays the base's (PEFT warns of missing keys)"
            )
        absent = [module.name for module in self._saved if not module.held]
        if absent:
            yield (
                f"modules_to_save names {_listed(absent)}, too, of which the adapter has nothing: "
                "it stays the base's, and PEFT cannot load the adapter onto this model"
            )
        earlier = [
            stored
            for name, stored in self._replacements()
            if ".base_layer." not in stored and self._is_wrapped(name)
        ]
        if earlier:
            yield (
                f"{_listed(earlier)}: applied here; today's PEFT leaves such tensors out, as their "
                "names lack base_layer"
            )
        if self._lacks_biases():
            bias = self._config["bias"]
            yield f"adapter_config.json has bias: {bias}, and the adapter has none: the base's stay"

    def _why_not(self, module: str, parts: Parts) -> str:
        """Why PEFT does not select a module by the adapter's name for it, nor by the model's."""
        renamed = self._targets.rule.of(f"{module}.weight").removesuffix(".weight")
        ends = self._targets.embeddings
        is_end = module_of(f"{module}.weight") in HEADS or f"{renamed}.weight" == ends.embedding
        if is_end and keeps_ties(self._config):
            return ""  # PEFT selects both where one is selected
        is_embedding = "embedding_a" in parts
        why = self._selected.why_not(module, is_embedding=is_embedding)
        if why and renamed != module:
            return self._selected.why_not(renamed, is_embedding=is_embedding)
        return why

    def _replacements(self) -> Iterator[tuple[str, str]]:
        """Tensors that replace the model's, and how the adapter calls them."""
        for name, ref in self._targets.replacements.items():
            yield name, ref.name.removeprefix(PREFIX)

    def _is_wrapped(self, name: str) -> bool:
        """Whether PEFT wraps the layer of a tensor."""
        module = name.rpartition(".")[0]
        stacks = {update.module for update in self._targets.fused}
        if module in self._targets.layers or module in stacks:
            return True
        return self._selected.by_name and not self._why_not(module, {})

    def _without_factors(self) -> list[str]:
        """Modules of the model that the config selects and the adapter has no factors for."""
        targets, selected = self._targets, self._selected
        if selected.by_default:
            return []
        changed = {
            targets.of(f"{module}.weight", self._tensors.keys()) for module in targets.layers
        }
        # transformers 5 has layers of single experts no longer, though files have them.
        has_experts = any(_EXPERT.search(module) for module in targets.layers)
        lacking = [
            module
            for name, tensor in self._tensors.items()
            if name.endswith(".weight") and len(tensor.shape) == 2 and name not in changed
            if has_experts or not _EXPERT.search(name)
            for module in [name.removesuffix(".weight")]
            if not selected.why_not(module, is_embedding=bool(_EMBEDDING.search(name)))
        ]
        keys = [update.key for update in targets.fused] + [f"{m}.weight" for m in targets.layers]
        for entry in self._config.get("target_parameters") or []:
            inside = f".{module_of(entry)}."  # of modules that files may call otherwise
            if not any(f".{key}".endswith(f".{entry}") for key in keys) and any(
                inside in f".{name}" for name in self._tensors
            ):
                lacking.append(entry)
        return lacking

    def _saved_modules(self) -> list[SavedModule]:
        """Modules of the model that are replaced, as the config says."""
        entries, targets = tuple(self._selected.saved), self._targets
        if not entries:
            return []
        tensors: dict[str, list[str]] = {}
        for name, tensor in self._tensors.items():
            # Masks of old files are called `bias`, too.
            if not name.endswith((".weight", ".bias")) or len(tensor.shape) > 3:
                continue
            module = name.rpartition(".")[0]
            while module:
                if module.endswith(entries):
                    tensors.setdefault(module, []).append(name)
                module = module.rpartition(".")[0]
        ends = targets.embeddings
        if ends.tied and ends.head not in self._tensors:
            head = ends.head.removesuffix(".weight")
            if head.endswith(entries):
                tensors[head] = [ends.head]
        held = {targets.of(name, self._tensors.keys()) or name for name in targets.replacements}
        if keeps_ties(self._config) and held & {ends.embedding, ends.head}:
            held |= {ends.embedding or "", ends.head}
        return [
            SavedModule(
                module,
                next(entry for entry in entries if module.endswith(entry)),
                tuple(name for name in names if name not in held),
                sum(name in held for name in names),
            )
            for module, names in tensors.items()
        ]

    def _lacks_biases(self) -> bool:
        """Whether the config says that biases are trained, and the adapter has none of them."""
        if self._config.get("bias") not in ("all", "lora_only"):
            return False
        if any(name.endswith(".bias") for name in self._targets.replacements):
            return False
        if self._config["bias"] == "all":
            return any(n.endswith(".bias") and len(t.shape) == 1 for n, t in self._tensors.items())
        rule, layers = self._targets.rule, self._targets.layers
        return any(rule.of(f"{module}.bias") in self._tensors for module in layers)


def _listed(names: Sequence[str]) -> str:
    """The first of some names, and how many there are besides."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
