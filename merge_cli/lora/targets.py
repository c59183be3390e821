"""LoRA adapters as PEFT saves them: which tensors of a model they change, and how.

    adapter_config.json         kind, rank, alpha, patterns (see adapter_config.py)
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight, ...lora_B.weight, ...

Every tensor of an adapter is used, or the adapter is refused with its name.
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
from merge_cli.lora import experts
from merge_cli.lora import experts as patches
from merge_cli.lora.adapter import WEIGHTS, AdapterContents, Parts, sort_contents
from merge_cli.lora.heads import (
    HEADS,
    find_ends,
    is_task_head,
    keeps_ties,
    labels,
    match_heights,
    put_head,
    untie,
)
from merge_cli.lora.names import find_rule
from merge_cli.lora.update import (
    ShiftedTensor,
    UpdatedTensor,
    contradictions,
    scaling,
    updated,
    why_unusable,
)


@dataclass(frozen=True)
class AppliedAdapter:
    """A model's tensors with an adapter.

    Attributes:
        tensors: all of them, by name.
        notes: what was done, for the plan.
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
    stamp: str,
    base: Mapping[str, Any] | None = None,
    root: Path | None = None,
) -> AppliedAdapter:
    """The model's tensors, those that the adapter changes as computed ones.

    Args:
        tensors: of the base model.
        config, stored: the adapter's.
        label: the model with its adapter, as the recipe names it.
        stamp: tells the adapter's files apart from others at their place.
        base: the base model's config.
        root: the base model's folder.

    Raises:
        SourceError: an adapter without tensors.
        MismatchError: tensors of the adapter that fit nothing, all of them.
    """
    if not stored:
        message = f"{WEIGHTS} holds no tensors: the adapter changes nothing"
        raise SourceError(message, model=label, hint="Save the adapter again.")
    about = _Application(
        dict(tensors), config, sort_contents(stored), label, stamp, base or {}, root
    )
    return about.result()


class _Application:
    """One adapter on one model."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        config: Mapping[str, Any],
        contents: AdapterContents,
        label: str,
        stamp: str,
        base: Mapping[str, Any],
        root: Path | None,
    ) -> None:
        self._original, self._tensors = tensors, dict(tensors)
        self._config, self._contents = config, contents
        self._label, self._stamp, self._base = label, stamp, base
        text = base.get("text_config")
        kinds = (item.get("model_type") for item in (base, text) if isinstance(item, dict))
        self._about = experts.About(
            config, next((k for k in kinds if isinstance(k, str)), ""), stamp
        )
        self._ends = find_ends(tensors, base)
        self._fused, self._unknown = experts.fused_updates(contents.modules, config)
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
                for n, r in self._contents.whole.items()
                if n not in head and not self._is_trained(n)
            }
        )
        if head:
            self._new_head(head)
        else:
            self._untie()
        self._replace(
            {n: r for n, r in self._contents.whole.items() if n not in head and self._is_trained(n)}
        )
        replaced = sorted(self._touched)
        changed = self._update_layers() | self._update_experts()
        self._match_heights()
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
        """What the model must have, as the adapter calls it: what decides between rules."""
        names = {f"{module}.weight" for module in self._layers} | set(self._contents.whole)
        result = {update.module for update in self._fused} | set(self._unknown)
        for name in names:
            if _last(name) in HEADS or is_task_head(name):
                continue  # a tied model has no head, a language model none for classes
            inside = re.match(r"(.*experts)\.\d+\.", name)
            result.add(inside.group(1) if inside else name)
        return result

    def _refuse_first(self) -> None:
        """What makes everything else pointless."""
        if self._rule.rivals:
            message = f"{self._label}: the adapter fits at more than one place: "
            hint = "Rename its tensors to the names in the model's files."
            message += "; or ".join(self._rule.rivals)
            problem = Problem(message, self._rule.missed[0], hint=hint)
            raise MismatchError([problem], "the adapter's names are ambiguous")
        self._problems += [
            Problem(f"{self._label}: the adapter holds it twice", name)
            for name in self._contents.twice
        ]
        self._problems += [
            Problem(f"{self._label}: {why}", module) for module, why in self._unknown.items()
        ]
        self._problems += [
            Problem(f"{self._label}: {why}", module)
            for module, why in contradictions(self._layers, self._config)
        ]

    def _target(self, name: str) -> str | None:
        """Where the files have a tensor; None where they lack it."""
        result = self._rule.of(name)
        if result in self._tensors:
            return result
        if _last(name) in HEADS:
            stem = self._ends.head.removesuffix("weight")
            beside = stem + name.rpartition(".")[2]
            return beside if beside in self._tensors else None
        return None

    def _is_trained(self, name: str) -> bool:
        """Whether PEFT trained a copy of it; otherwise it saved the base's own, resized perhaps."""
        module = name.rpartition(".")[0]
        kept = self._config.get("modules_to_save") or []
        if any(module == item or module.endswith(f".{item}") for item in kept):
            return True
        ends = (self._ends.embedding, self._ends.head)
        return self._rule.of(name) not in ends and _last(name) not in HEADS

    def _split_head(self) -> set[str]:
        """Tensors of a head for classes that the model lacks."""
        return {n for n in self._contents.whole if is_task_head(n) and self._target(n) is None}

    def _new_head(self, names: set[str]) -> None:
        width = self._tensors[self._ends.embedding].shape[1] if self._ends.embedding else 0
        brought = {n: r for n, r in self._contents.whole.items() if n in names}
        result = put_head(brought, self._base, self._config.get("task_type"), width, self._label)
        self._problems += result.problems
        self._notes += result.notes
        self._changes |= result.changes
        if result.tensors:
            stem = self._ends.head.removesuffix("weight")
            for name in (f"{stem}weight", f"{stem}bias"):
                self._tensors.pop(name, None)
        for name, ref in result.tensors.items():
            self._tensors[name] = ref._replace(name=name)

    def _untie(self) -> None:
        layers = {f"{module}.weight" for module in self._layers}
        brought = {name for name in self._contents.whole if self._is_trained(name)}
        found = {
            self._ends.head if _last(n) in HEADS else self._rule.of(n) for n in layers | brought
        }
        joint = untie(
            self._tensors,
            self._ends,
            self._base,
            trained=frozenset(found),
            adapter=self._config,
            label=self._label,
        )
        self._tensors = joint.tensors
        self._changes |= joint.changes
        self._notes += joint.notes
        self._problems += joint.problems

    def _is_copy(self, name: str, shape: tuple[int, ...] | None = None) -> bool:
        """Whether it is a head that is the embedding with the adapter, too, and says nothing new.

        Args:
            shape: of a tensor that is brought whole.
        """
        embedding = self._ends.embedding
        tied = self._ends.tied and "tie_word_embeddings" not in self._changes
        if not tied or embedding is None or _last(name) not in HEADS:
            return False
        brought = [r for n, r in self._contents.whole.items() if self._rule.of(n) == embedding]
        if keeps_ties(self._config):
            layers = {self._rule.of(f"{module}.weight") for module in self._layers}
            return bool(brought) or embedding in layers
        same = brought[0].shape if brought else self._original[embedding].shape
        return shape == same and not self._is_trained(name)

    def _replace(self, brought: Mapping[str, TensorRef]) -> None:
        """Tensors that are the adapter's instead of the model's."""
        for name, ref in brought.items():
            if self._is_copy(name, ref.shape):
                continue
            target = self._target(name)
            if target is None:
                message = f"{self._label}: the adapter brings it, the model lacks it"
                self._problems.append(Problem(message, name))
                continue
            shape = self._tensors[target].shape
            if ref.shape != shape and not self._resizes(target, ref, shape):
                message = f"{list(ref.shape)} in the adapter, {list(shape)} without"
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
        stem = self._ends.head.removesuffix("weight")
        return target in (self._ends.embedding, f"{stem}weight", f"{stem}bias")

    def _update_layers(self) -> set[str]:
        """Factors of single layers. Returns the names of what changes."""
        changed: set[str] = set()
        single = []
        for module, parts in self._layers.items():
            if self._is_copy(f"{module}.weight"):
                continue
            target = self._target(f"{module}.weight")
            inside = self._rule.of(f"{module}.weight").removesuffix(".weight")
            if target is None and patches.single_target(inside, self._tensors):
                single.append((module, inside, parts))
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
        stacks, wrong = patches.apply_single(single, self._tensors, self._about)
        self._problems += [Problem(f"{self._label}: {why}", module) for module, why in wrong]
        self._tensors |= stacks
        return changed | stacks.keys()

    def _update(self, module: str, target: str, parts: Parts) -> str:
        """Update one layer; why not, where it cannot be."""
        weight = self._tensors[target]
        if isinstance(weight, UpdatedTensor):
            return "two modules of the adapter change it"
        if len(weight.shape) == 3 and parts.keys() == {"a", "b"}:
            update = experts.ExpertUpdate(module, "weight", parts["a"], parts["b"])
            result = patches.apply_fused(
                update, target.removesuffix(".weight"), self._tensors, self._about
            )
            if isinstance(result, str):
                return result
            self._tensors |= result
            return ""
        why = why_unusable(weight, parts, self._config, module, self._about.model_type)
        if why:
            return why
        self._tensors[target] = updated(
            weight, parts, self._config, module, self._about.model_type, self._stamp
        )
        self._touched.add(target)
        if "bias" in parts:
            beside = self._target(f"{module}.bias")
            if beside is None or self._tensors[beside].shape != parts["bias"].shape:
                return "the adapter shifts the layer's bias, which is not in the model"
            scale = scaling(self._config, module, parts["a"].shape[0])
            self._tensors[beside] = ShiftedTensor(
                self._tensors[beside], parts["bias"], scale, self._stamp
            )
        return ""

    def _update_experts(self) -> set[str]:
        """Factors of all experts of a parameter. Returns the names of what changes."""
        changed: set[str] = set()
        for update in self._fused:
            result = patches.apply_fused(
                update, self._rule.of(update.module), self._tensors, self._about
            )
            if isinstance(result, str):
                self._problems.append(Problem(f"{self._label}: {result}", update.module))
                continue
            self._tensors |= result
            changed |= result.keys()
        return changed

    def _match_heights(self) -> None:
        ends = {self._ends.embedding, self._ends.head}
        untouched = frozenset(name for name in ends if name and name not in self._touched)
        notes, problems, rows = match_heights(self._tensors, self._ends, untouched, self._label)
        self._notes += notes
        self._problems += problems
        before = self._original.get(self._ends.embedding or "")
        if rows is not None and before is not None and rows != before.shape[0]:
            self._changes["vocab_size"] = rows
            self._notes.append(
                f"config.json: vocab_size: {before.shape[0]} -> {rows}, as the adapter's embedding;"
                " its tokenizer comes along where `tokenizer_source` names a model that has it"
            )

    def _ranks(self) -> set[int]:
        result = {parts["b"].shape[1] for parts in self._layers.values() if "b" in parts}
        return result | {experts.rank_of(u, self._config) or u.b.shape[1] for u in self._fused}


def _last(name: str) -> str:
    """The module that a tensor is of."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _range(values: set[int]) -> str:
    if not values:
        return "?"
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"
