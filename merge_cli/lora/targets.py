"""Which tensors of a model an adapter's names mean, and which of its tensors change nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.tensors import Tensor
from merge_cli.lora import expert_updates
from merge_cli.lora.adapter import AdapterContents, Parts
from merge_cli.lora.heads import HEADS, find_embedding_and_head, keeps_ties
from merge_cli.lora.names import find_rule
from merge_cli.lora.task_heads import is_task_head


class Targets:
    """An adapter's tensors by the tensors of the model that they are for.

    Args:
        tensors: of the model, as they are without the adapter.
        config: the adapter's.
        base: the model's config.
        root: the model's folder.

    Attributes:
        fused: updates of all experts of a parameter at once.
        unknown: modules of experts whose factors cannot be used, and why.
        layers: factors of every other module.
        embeddings: which tensors are the model's input embedding and head.
        rule: turns the adapter's names into the model's.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        contents: AdapterContents,
        base: Mapping[str, Any],
        root: Path | None,
    ) -> None:
        self._original, self._config = tensors, config
        self.replacements = contents.replacements
        self.embeddings = find_embedding_and_head(tensors, base)
        self.fused, self.unknown = expert_updates.fused_updates(contents.modules, config)
        inside = {u.module for u in self.fused} | self.unknown.keys()
        self.layers: dict[str, Parts] = {
            m: parts
            for m, parts in contents.modules.items()
            if re.sub(r"(\.base_layer)+$", "", m) not in inside
        }
        self.rule = find_rule(self._required(), tensors, root)

    def _required(self) -> set[str]:
        """Names that the model must have, as the adapter writes them; they decide between rules."""
        names = {f"{module}.weight" for module in self.layers} | set(self.replacements)
        required = {update.module for update in self.fused} | set(self.unknown)
        for name in names:
            if module_of(name) in HEADS or is_task_head(name):
                continue  # a tied model has no head, a language model none for classes
            inside = re.match(r"(.*experts)\.\d+\.", name)
            required.add(inside.group(1) if inside else name)
        return required

    def of(self, name: str, stored: Set[str]) -> str | None:
        """The name of a tensor in the files; None where they lack it.

        Args:
            stored: names of the model's tensors by now: a head may have come or gone.
        """
        renamed = self.rule.of(name)
        if renamed in stored:
            return renamed
        if module_of(name) in HEADS:
            stem = self.embeddings.head.removesuffix("weight")
            head_tensor = stem + name.rpartition(".")[2]
            return head_tensor if head_tensor in stored else None
        return None

    def is_trained(self, name: str) -> bool:
        """Whether PEFT trained a copy of it; if not, it saved the base's, which may be resized."""
        module = name.rpartition(".")[0]
        saved = self._config.get("modules_to_save") or []
        if any(
            module == module_name or module.endswith(f".{module_name}") for module_name in saved
        ):
            return True
        ends = (self.embeddings.embedding, self.embeddings.head)
        return self.rule.of(name) not in ends and module_of(name) not in HEADS

    def trained(self) -> frozenset[str]:
        """The model's tensors that the adapter trains, the head by its name."""
        layers = {f"{module}.weight" for module in self.layers}
        replacements = {name for name in self.replacements if self.is_trained(name)}
        return frozenset(
            self.embeddings.head if module_of(name) in HEADS else self.rule.of(name)
            for name in layers | replacements
        )

    def is_copy(self, name: str, shape: tuple[int, ...] | None, *, untied: bool) -> bool:
        """Whether it is a head that stays tied to the embedding, and so adds nothing.

        Args:
            shape: of a tensor that replaces the model's; None of a layer with factors.
            untied: the adapter has separated the head from the embedding.
        """
        embedding = self.embeddings.embedding
        if not self.embeddings.tied or untied or embedding is None or module_of(name) not in HEADS:
            return False
        replacements = [r for n, r in self.replacements.items() if self.rule.of(n) == embedding]
        if keeps_ties(self._config):
            layers = {self.rule.of(f"{module}.weight") for module in self.layers}
            return bool(replacements) or embedding in layers
        embedding_shape = replacements[0].shape if replacements else self._original[embedding].shape
        return shape == embedding_shape and not self.is_trained(name)


def module_of(name: str) -> str:
    """The last part of the name of the module that a tensor is of."""
    return name.rpartition(".")[0].rpartition(".")[2]
