"""An adapter's tensors, sorted out: factors by module, and what replaces the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge_cli.checkpoint.header import TensorRef

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTORS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora_B.bias": "bias",
}  # fmt: skip
# Names of PEFT's wrappers: today's, and those of version 0.4 and before.
_WRAPPERS = (".base_layer", ".modules_to_save.default", ".original_module")
Parts = dict[str, TensorRef]


@dataclass(frozen=True)
class Contents:
    """An adapter's tensors, sorted out.

    Attributes:
        modules: factors by module.
        whole: tensors that replace the model's, by name.
        twice: names that several of its tensors have.
    """

    modules: dict[str, Parts]
    whole: Parts
    twice: tuple[str, ...] = ()


def sorted_out(stored: Mapping[str, TensorRef]) -> Contents:
    """Factors by module, and tensors that replace the model's, by name."""
    modules: dict[str, Parts] = {}
    whole: Parts = {}
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
            for wrapper in _WRAPPERS:
                plain = plain.replace(wrapper, "")
            twice += [name] if plain in whole else []
            whole[plain] = ref
    return Contents(modules, whole, tuple(twice))
