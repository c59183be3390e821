"""Which module of the model each stored tensor belongs to, and of what kind that module is.

PEFT addresses modules as transformers names them, and not every stored name is one: GPT-2's
checkpoints leave out a prefix that the model has. So the model is built without weights and asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from merge_cli.checkpoint.source import Source
from merge_cli.errors import SourceError
from merge_cli.evaluation.seats import by_name

# `linear` stores [out, in], `conv1d` (GPT-2's) [in, out]; `embedding` looks rows up; `leaf` is any
# other module that has no modules inside, `inner` one that has.
Kind = Literal["linear", "conv1d", "embedding", "leaf", "inner"]


@dataclass(frozen=True)
class Seat:
    """Where a tensor belongs: `model.norm`, `weight`."""

    module: str
    parameter: str
    kind: Kind


class Skeleton:
    """A model's modules without its weights.

    Args:
        source: the model; its config decides.

    Raises:
        SourceError: transformers has no class for it.
    """

    def __init__(self, source: Source) -> None:
        self._label = source.label
        self._net = _build(source)
        self._modules = dict(self._net.named_modules())

    def seats(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Seat]:
        """Of stored tensors, by name; without those that transformers holds in another form.

        Args:
            stored: their shapes.
        """
        parameters = dict(self._net.named_parameters(remove_duplicate=False))
        found = {}
        for name, own in by_name(stored, parameters).items():
            module, _, parameter = own.rpartition(".")
            found[name] = Seat(module, parameter, _kind(self._modules[module]))
        return found

    @property
    def task_type(self) -> str | None:
        """PEFT's word for what the model does; None leaves it open."""
        name = type(self._net).__name__
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "CAUSAL_LM"
        seq2seq = name.endswith("ForConditionalGeneration")
        return "SEQ_2_SEQ_LM" if seq2seq and self._net.config.is_encoder_decoder else None


def _build(source: Source) -> Any:
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.from_pretrained(
                str(source.root), trust_remote_code=False
            )
            named = getattr(transformers, (config.architectures or [""])[0], None)
            with torch.device("meta"):
                if named is not None:
                    return named(config)
                return transformers.AutoModelForCausalLM.from_config(config)
        except Exception as error:  # a config can break transformers in any way it likes
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"transformers cannot tell what its modules are: {said}"
            hint = "PEFT loads adapters of models that transformers has a class for."
            raise SourceError(what, model=source.label, hint=hint) from error


def _kind(module: Any) -> Kind:
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "inner" if next(module.children(), None) is not None else "leaf"
