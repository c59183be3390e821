"""Applying a LoRA adapter to a model: which tensors it changes, and how.

    adapter_config.json         kind, rank, alpha, patterns (see lora/config.py)
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight, ...lora_B.weight, ...

Every tensor of the adapter is used; otherwise the adapter is refused, with the tensor's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import MismatchError, Problem, SourceError
from merge_cli.lora import expert_updates, experts
from merge_cli.lora.adapter import WEIGHTS, AdapterContents, Parts, sort_contents
from merge_cli.lora.config import scale_of
from merge_cli.lora.heads import (
    HEADS,
    add_task_head,
    find_embedding_and_head,
    is_task_head,
    keeps_ties,
    labels,
    match_rows,
    untie,
)
from merge_cli.lora.names import find_rule
from merge_cli.lora.update import (
    ShiftedTensor,
    UpdatedTensor,
    contradictions,
    update_weight,
    why_unusable,
)


@dataclass(frozen=True)
class AppliedAdapter:
    """A model's tensors with an adapter.

    Attributes:
        tensors: all of them, by name.
        notes: what it did, for the plan.
        changes: keys of the model's config that follow.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


def apply_adapter(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    stored: Mapping[str, TensorRef],
    *,
    label: str,
    fingerprint: str,
    base: Mapping[str, Any] | None = None,
    root: Path | None = None,
) -> AppliedAdapter:
    """A model's tensors with an adapter: those that it changes are computed while they are read.

    Args:
        tensors: of the base model.
        config, stored: the adapter's.
        label: the model with its adapter, as the recipe names it.
        fingerprint: fingerprint of the adapter's weights.
        base: the base model's config.
        root: the base model's folder.

    Raises:
        SourceError: an adapter without tensors.
        MismatchError: all tensors of the adapter that do not fit the model.
    """
    if not stored:
        message = f"{WEIGHTS} holds no tensors: the adapter changes nothing"
        raise SourceError(message, model=label, hint="Save the adapter again.")
    application = _Application(
        dict(tensors), config, sort_contents(stored), label, fingerprint, base or {}, root
    )
    return application.result()


class _Application:
    """One adapter on one model."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        config: Mapping[str, Any],
        contents: AdapterContents,
        label: str,
        fingerprint: str,
        base: Mapping[str, Any],
        root: Path | None,
    ) -> None:
        self._original, self._tensors = tensors, dict(tensors)
        self._config, self._contents = config, contents
        self._label, self._fingerprint, self._base = label, fingerprint, base
        text = base.get("text_config")
        types = (section.get("model_type") for section in (base, text) if isinstance(section, dict))
        self._context = expert_updates.AdapterContext(
            config, next((k for k in types if isinstance(k, str)), ""), fingerprint
        )
        self._embeddings = find_embedding_and_head(tensors, base)
        self._fused, self._unknown = expert_updates.fused_updates(contents.modules, config)
        inside = {u.module for u in self._fused} | self._unknown.keys()
        self._layers = {
            m: parts
            for m, parts in contents.modules.items()
            if re.sub(r"(\.base_layer)+$", "", m) not in inside
        }
        self._rule = find_rule(self._required(), tensors, root)
        self._problems: list[Problem] = []
        self._notes: list[str] = []
        self._changes: dict[str, Any] = {}
        self._touched: set[str] = set()

    def result(self) -> AppliedAdapter:
        self._refuse_first()
        head = self._split_head()
        self._replace(
            {
                n: r
                for n, r in self._contents.replacements.items()
                if n not in head and not self._is_trained(n)
            }
        )
        if head:
            self._new_head(head)
        else:
            self._untie()
        self._replace(
            {
                n: r
                for n, r in self._contents.replacements.items()
                if n not in head and self._is_trained(n)
            }
        )
        replaced = sorted(self._touched)
        changed = self._update_layers() | self._update_experts()
        self._match_rows()
        if self._problems:
            raise MismatchError(self._problems, "the adapter does not fit its model")
        notes = (
            [f"the adapter changes {len(changed)} tensors (rank {_range(self._ranks())})"]
            if changed
            else []
        )
        if replaced:
            notes.append(f"the adapter replaces {', '.join(replaced)}")
        if self._rule.note:
            notes.append(f"the adapter's names are the model's by {self._rule.note}")
        return AppliedAdapter(self._tensors, (*notes, *self._notes), self._changes)

    def _required(self) -> set[str]:
        """Names that the model must have, as the adapter writes them; they decide between rules."""
        names = {f"{module}.weight" for module in self._layers} | set(self._contents.replacements)
        required = {update.module for update in self._fused} | set(self._unknown)
        for name in names:
            if _last(name) in HEADS or is_task_head(name):
                continue  # a tied model has no head, a language model none for classes
            inside = re.match(r"(.*experts)\.\d+\.", name)
            required.add(inside.group(1) if inside else name)
        return required

    def _refuse_first(self) -> None:
        """Collect the problems that the adapter has with any model."""
        if self._rule.rivals:
            message = f"{self._label}: the adapter fits in more than one way: "
            hint = "Rename its tensors to the names in the model's files."
            message += "; or ".join(self._rule.rivals)
            problem = Problem(message, self._rule.missed[0], hint=hint)
            raise MismatchError([problem], "the adapter's names are ambiguous")
        self._problems += [
            Problem(f"{self._label}: the adapter holds it twice", name)
            for name in self._contents.duplicates
        ]
        self._problems += [
            Problem(f"{self._label}: {why}", module) for module, why in self._unknown.items()
        ]
        self._problems += [
            Problem(f"{self._label}: {why}", module)
            for module, why in contradictions(self._layers, self._config)
        ]

    def _target(self, name: str) -> str | None:
        """The name of a tensor in the files; None where they lack it."""
        renamed = self._rule.of(name)
        if renamed in self._tensors:
            return renamed
        if _last(name) in HEADS:
            stem = self._embeddings.head.removesuffix("weight")
            head_tensor = stem + name.rpartition(".")[2]
            return head_tensor if head_tensor in self._tensors else None
        return None

    def _is_trained(self, name: str) -> bool:
        """Whether PEFT trained a copy of it; if not, it saved the base's, which may be resized."""
        module = name.rpartition(".")[0]
        saved = self._config.get("modules_to_save") or []
        if any(
            module == module_name or module.endswith(f".{module_name}") for module_name in saved
        ):
            return True
        ends = (self._embeddings.embedding, self._embeddings.head)
        return self._rule.of(name) not in ends and _last(name) not in HEADS

    def _split_head(self) -> set[str]:
        """Tensors of a head for classes that the model lacks."""
        return {
            n for n in self._contents.replacements if is_task_head(n) and self._target(n) is None
        }

    def _new_head(self, names: set[str]) -> None:
        width = (
            self._tensors[self._embeddings.embedding].shape[1] if self._embeddings.embedding else 0
        )
        replacements = {n: r for n, r in self._contents.replacements.items() if n in names}
        change = add_task_head(
            replacements, self._base, self._config.get("task_type"), width, self._label
        )
        self._problems += change.problems
        self._notes += change.notes
        self._changes |= change.changes
        if change.tensors:
            stem = self._embeddings.head.removesuffix("weight")
            for name in (f"{stem}weight", f"{stem}bias"):
                self._tensors.pop(name, None)
        self._tensors |= change.tensors

    def _untie(self) -> None:
        layers = {f"{module}.weight" for module in self._layers}
        replacements = {name for name in self._contents.replacements if self._is_trained(name)}
        trained = {
            self._embeddings.head if _last(n) in HEADS else self._rule.of(n)
            for n in layers | replacements
        }
        change = untie(
            self._tensors,
            self._embeddings,
            self._base,
            trained=frozenset(trained),
            adapter=self._config,
            label=self._label,
        )
        self._tensors = change.tensors
        self._changes |= change.changes
        self._notes += change.notes
        self._problems += change.problems

    def _is_copy(self, name: str, shape: tuple[int, ...] | None = None) -> bool:
        """Whether it is a head that stays tied to the embedding, and so adds nothing.

        Args:
            shape: of a tensor that replaces the model's.
        """
        embedding = self._embeddings.embedding
        tied = self._embeddings.tied and "tie_word_embeddings" not in self._changes
        if not tied or embedding is None or _last(name) not in HEADS:
            return False
        replacements = [
            r for n, r in self._contents.replacements.items() if self._rule.of(n) == embedding
        ]
        if keeps_ties(self._config):
            layers = {self._rule.of(f"{module}.weight") for module in self._layers}
            return bool(replacements) or embedding in layers
        embedding_shape = replacements[0].shape if replacements else self._original[embedding].shape
        return shape == embedding_shape and not self._is_trained(name)

    def _replace(self, replacements: Mapping[str, TensorRef]) -> None:
        """Replace tensors of the model by the adapter's."""
        for name, ref in replacements.items():
            if self._is_copy(name, ref.shape):
                continue
            target = self._target(name)
            if target is None:
                message = f"{self._label}: the adapter brings it, the model lacks it"
                self._problems.append(Problem(message, name))
                continue
            shape = self._tensors[target].shape
            if ref.shape != shape and not self._resizes(target, ref, shape):
                message = f"{list(ref.shape)} in the adapter, {list(shape)} in the model"
                self._problems.append(Problem(f"{self._label}: {message}", name))
                continue
            self._tensors[target] = ref._replace(name=target)
            self._touched.add(target)

    def _resizes(self, target: str, ref: TensorRef, shape: tuple[int, ...]) -> bool:
        """Whether a tensor may have another number of rows: of tokens, or of labels."""
        if len(ref.shape) != len(shape) or ref.shape[1:] != shape[1:]:
            return False
        if is_task_head(target):
            self._changes |= labels(self._base, ref.shape[0])
            return True
        stem = self._embeddings.head.removesuffix("weight")
        return target in (self._embeddings.embedding, f"{stem}weight", f"{stem}bias")

    def _update_layers(self) -> set[str]:
        """Factors of single layers. Returns the names of what changes."""
        changed: set[str] = set()
        separate = []
        for module, parts in self._layers.items():
            if self._is_copy(f"{module}.weight"):
                continue
            target = self._target(f"{module}.weight")
            layer = self._rule.of(f"{module}.weight").removesuffix(".weight")
            if target is None and experts.single_target(layer, self._tensors):
                separate.append((module, layer, parts))
                continue
            if target is None:
                message = f"{self._label}: the adapter changes it, the model lacks it"
                self._problems.append(Problem(message, module))
                continue
            why = self._update(module, target, parts)
            if why:
                self._problems.append(Problem(f"{self._label}: {why}", module))
                continue
            changed.add(target)
        stacks, problems = experts.apply_single(separate, self._tensors, self._context)
        self._problems += [Problem(f"{self._label}: {why}", module) for module, why in problems]
        self._tensors |= stacks
        return changed | stacks.keys()

    def _update(self, module: str, target: str, parts: Parts) -> str:
        """Update one layer; why not, where it cannot be."""
        weight = self._tensors[target]
        if isinstance(weight, UpdatedTensor):
            return "two modules of the adapter change it"
        if len(weight.shape) == 3 and parts.keys() == {"a", "b"}:
            update = expert_updates.ExpertUpdate(module, "weight", parts["a"], parts["b"])
            changed = experts.apply_fused(
                update, target.removesuffix(".weight"), self._tensors, self._context
            )
            if isinstance(changed, str):
                return changed
            self._tensors |= changed
            return ""
        why = why_unusable(weight, parts, self._config, module, self._context.model_type)
        if why:
            return why
        self._tensors[target] = update_weight(
            weight, parts, self._config, module, self._context.model_type, self._fingerprint
        )
        self._touched.add(target)
        if "bias" in parts:
            bias_name = self._target(f"{module}.bias")
            if bias_name is None or self._tensors[bias_name].shape != parts["bias"].shape:
                return "the adapter shifts the layer's bias, which is not in the model"
            scale = scale_of(self._config, module, parts["a"].shape[0])
            self._tensors[bias_name] = ShiftedTensor(
                self._tensors[bias_name], parts["bias"], scale, self._fingerprint
            )
        return ""

    def _update_experts(self) -> set[str]:
        """Factors of all experts of a parameter. Returns the names of what changes."""
        changed: set[str] = set()
        for update in self._fused:
            tensors = experts.apply_fused(
                update, self._rule.of(update.module), self._tensors, self._context
            )
            if isinstance(tensors, str):
                self._problems.append(Problem(f"{self._label}: {tensors}", update.module))
                continue
            self._tensors |= tensors
            changed |= tensors.keys()
        return changed

    def _match_rows(self) -> None:
        ends = {self._embeddings.embedding, self._embeddings.head}
        untouched = frozenset(name for name in ends if name and name not in self._touched)
        notes, problems, rows = match_rows(self._tensors, self._embeddings, untouched, self._label)
        self._notes += notes
        self._problems += problems
        before = self._original.get(self._embeddings.embedding or "")
        if rows is not None and before is not None and rows != before.shape[0]:
            self._changes["vocab_size"] = rows
            self._notes.append(
                f"config.json: vocab_size: {before.shape[0]} -> {rows}, as the adapter's embedding;"
                " its tokenizer comes along where `tokenizer_source` names a model that has it"
            )

    def _ranks(self) -> set[int]:
        ranks = {parts["b"].shape[1] for parts in self._layers.values() if "b" in parts}
        return ranks | {
            expert_updates.rank_of(u, self._config) or u.b.shape[1] for u in self._fused
        }


def _last(name: str) -> str:
    """The module that a tensor is of."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _range(values: set[int]) -> str:
    if not values:
        return "?"
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"
