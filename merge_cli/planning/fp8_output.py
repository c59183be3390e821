"""`out_dtype: fp8`: which tensors are written in fp8, and what config.json says about it.

The format is that of DeepSeek, Qwen and transformers (`quant_method: fp8`): E4M3 codes and, for
each block of 128 x 128, a float32 scale in `NAME_scale_inv`. Written in fp8 are the matrices that
the reference stores in fp8. Where it stores none, these are the linear layers and experts of
numbered layers, without routers, norms, embeddings, heads, state-space mixers, and vision and audio
towers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import Problem
from merge_cli.formats.fp8 import FP8
from merge_cli.formats.storage_format import QUANTIZATION
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source

CODES, BLOCK = FP8.codes, FP8.block
# Their layers are stored [in, out] by a class that transformers does not read in fp8.
_TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_LAYER = re.compile(r"(^|\.)\d+\.")
_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_WHOLE = re.compile(
    r"embed|norm|router|conv|lm_head|wte|wpe|visual|vision|audio|mamba|mixer|dt_proj|x_proj"
    r"|(^|[._])gate\.weight$"
)


class Fp8Choice:
    """Which output tensors are written in fp8: decided by the reference and by names."""

    def __init__(self, reference: Source) -> None:
        self._stores_fp8 = any(_in_fp8(tensor) for tensor in reference.tensors.values())

    def block(self, name: str, tensor: Tensor) -> tuple[int, int] | None:
        """Rows and columns that share a scale, of an output tensor; None for one in full."""
        shape = tensor.shape
        if len(shape) < 2 or (len(shape) > 2 and shape[-2] % BLOCK[0]):
            return None
        if self._stores_fp8:
            return BLOCK if _in_fp8(tensor) else None
        linear = len(shape) == 2 and name.endswith(".weight") and bool(_LAYER.search(name))
        even = shape[-2] % BLOCK[0] == 0 and shape[-1] % BLOCK[1] == 0
        layer = (linear and not _WHOLE.search(name)) or bool(_EXPERTS.search(name))
        return BLOCK if layer and even else None


def _in_fp8(tensor: Tensor) -> bool:
    kind = tensor.stored[0].dtype if tensor.stored else ""
    return kind.startswith("F8_E") and kind != "F8_E8M0"


def refused(recipe: Recipe, config: Mapping[str, Any]) -> Problem | None:
    """Why this model cannot be written in fp8, if it cannot."""
    kind = text_config(config).get("model_type")
    if not recipe.fp8 or kind not in _TURNED:
        return None
    message = f"{kind} stores its layers [in, out], which is not read in fp8."
    return recipe.problem("out_dtype", message, "Use bfloat16.")


def nothing(recipe: Recipe, tasks: Iterable[TensorTask]) -> Problem | None:
    """A model without a matrix that is good for it."""
    if not recipe.fp8 or any(task.block for task in tasks):
        return None
    message = "no layer has rows and columns in multiples of 128."
    return recipe.problem("out_dtype", message, "Use bfloat16.")


def described(plan: Plan) -> Plan:
    """A plan whose config says what is written in fp8, if something is."""
    scaled = [task for task in plan.tasks if task.block]
    if not scaled or not plan.config:
        return plan
    unconverted = _modules(task for task in plan.tasks if not task.block)
    share = sum(task.size for task in scaled) / max(1, plan.parameter_count)
    note = (
        f"{len(scaled)} matrices ({share:.0%} of the weights) are written in fp8, with a scale for "
        f"each {BLOCK[0]} x {BLOCK[1]}; everything else in its dtype"
    )
    config = {**plan.config, QUANTIZATION: FP8.settings(unconverted)}
    return replace(plan, config=config, notes=(*plan.notes, note))


def _modules(tasks: Iterable[TensorTask]) -> Sequence[str]:
    """The modules of matrices that stay as they are, as transformers calls them; the head even
    where it is tied, and so has no tensor."""
    names = ["lm_head"]
    for task in tasks:
        if len(task.shape) > 1:
            name = task.name.removesuffix(".weight")
            names.append(name if name != task.name else name.rpartition(".")[0])
    return list(dict.fromkeys(names))
