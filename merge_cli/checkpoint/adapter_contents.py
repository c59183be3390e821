"""An adapter's tensors, sorted out: factors by module, and what replaces the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge_cli.checkpoint.header import TensorRef

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTORS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
}
# Names of PEFT's wrappers: today's, and those of version 0.4 and before.
_WRAPPERS = (".base_layer", ".modules_to_save.default", ".modules_to_save", ".original_module")
Parts = dict[str, TensorRef]


@dataclass(frozen=True)
class AdapterContents:
    """An adapter's tensors, sorted out.

    Attributes:
        modules: factors by module.
        whole: tensors that replace the model's, by name.
        twice: names that several of its tensors have.
    """

    modules: dict[str, Parts]
    whole: Parts
    twice: tuple[str, ...] = ()


def sort_contents(stored: Mapping[str, TensorRef]) -> AdapterContents:
    """Factors by module, and tensors that replace the model's, by name."""
    modules: dict[str, Parts] = {}
    whole: Parts = {}
    ranks: dict[str, int] = {}
    twice = []
    for name, ref in stored.items():
        plain = name.removeprefix(PREFIX)
        for ending, part in _FACTORS.items():
            if plain.endswith(f".{ending}"):
                parts = modules.setdefault(plain.removesuffix(f".{ending}"), {})
                twice += [name] if part in parts else []
                parts[part] = ref
                break
        else:
            rank = _rank(plain)
            for wrapper in _WRAPPERS:
                plain = plain.replace(wrapper, "")
            if plain in whole and rank != ranks[plain]:
                if rank > ranks[plain]:
                    continue
            elif plain in whole:
                twice.append(name)
            whole[plain], ranks[plain] = ref, rank
    return AdapterContents(modules, whole, tuple(twice))


def _rank(name: str) -> int:
    """Which of a module's tensors counts, the least first.

    Of a resized embedding PEFT saves the trained copy by its plain name, and everything that its
    wrapper holds once more: that copy, and the one that is not trained.
    """
    if ".original_module." in name:
        return 2
    return 1 if ".modules_to_save." in name else 0
