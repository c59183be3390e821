"""An adapter's folder as PEFT reads it: factors as they come, then config and one weights file.

    adapter_config.json
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight, ...lora_B.weight, ...

How large the file becomes is known when the last rank is. Until then factors wait in a file beside
it, so that memory holds those of one module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_cli.adapters.factors import Factors
from merge_cli.checkpoint.adapter_config import CONFIG
from merge_cli.checkpoint.adapter_contents import PREFIX, WEIGHTS
from merge_cli.checkpoint.header import DTYPES
from merge_cli.checkpoint.layout import OutputTensor, lay_out
from merge_cli.checkpoint.raw import FilePool, allocate, copy_range, write_error, write_from
from merge_cli.checkpoint.tensors import Read, Tensor

_WAITING = "factors.waiting"
_BLOCK = 2**22  # elements of a tensor that is copied


class AdapterFolder:
    """Written step by step: `add`, `keep` and `put`, then `finish`.

    Args:
        path: exists, and is empty.
        turned: layers are stored [in, out], and so is the whole adapter.
    """

    def __init__(self, path: Path, *, turned: bool = False) -> None:
        self._path, self._turned = path, turned
        self._waiting: dict[OutputTensor, int] = {}
        self._whole: dict[OutputTensor, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.parameters: dict[str, int] = {}
        try:
            self._file = (path / _WAITING).open("wb")
        except OSError as error:
            raise write_error(error, path) from error

    def add(self, module: str, factors: Factors, *, embedding: bool = False) -> None:
        """A module's update, factors of the weight as it is stored."""
        if embedding:  # (B A)^T, whatever the layers are like
            self.put(f"{module}.lora_embedding_A", factors.turned.right)
            self.put(f"{module}.lora_embedding_B", factors.turned.left)
        else:
            own = factors.turned if self._turned else factors  # stored [in, out]: (B A)^T
            self.put(f"{module}.lora_A.weight", own.right)
            self.put(f"{module}.lora_B.weight", own.left)
        self.ranks[module] = factors.rank

    def put(self, name: str, values: Any) -> None:
        """A tensor of the adapter, numpy float32, by its parameter's name in the model."""
        output = OutputTensor(PREFIX + name, "F32", values.shape)
        try:
            self._waiting[output] = self._file.tell()
            self._file.write(values.reshape(-1).data)
        except OSError as error:
            raise write_error(error, self._path) from error

    def keep(self, name: str, tensor: Tensor) -> None:
        """A tensor that replaces the model's, by its parameter's name in the model."""
        self._whole[OutputTensor(PREFIX + name, tensor.dtype, tensor.shape)] = tensor

    def finish(self, config: Mapping[str, Any], read: Read) -> int:
        """Write the file and the config.

        Returns:
            bytes of the weights file.
        """
        target, waiting = self._path / WEIGHTS, self._path / _WAITING
        outputs = [*self._waiting, *self._whole]
        (shard,) = lay_out(outputs, sum(output.nbytes for output in outputs) + 1)
        sources, targets = FilePool(os.O_RDONLY), FilePool(os.O_RDWR)
        try:
            self._file.close()
            allocate(target, shard.size, shard.header)
            for output, start in self._waiting.items():
                copy_range(
                    sources,
                    waiting,
                    start,
                    targets,
                    target,
                    shard.offsets[output.name],
                    output.nbytes,
                    "",
                )
            for output, tensor in self._whole.items():
                _copy(tensor, read, targets, target, shard.offsets[output.name])
            waiting.unlink()
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (self._path / CONFIG).write_text(text, encoding="utf-8")
        except OSError as error:
            raise write_error(error, self._path) from error
        finally:
            sources.close()
            targets.close()
        return shard.size

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()


def _copy(tensor: Tensor, read: Read, targets: FilePool, target: Path, offset: int) -> None:
    width = DTYPES[tensor.dtype][0]
    for start in range(0, tensor.size, _BLOCK):
        count = min(_BLOCK, tensor.size - start)
        buffer = memoryview(bytearray(count * width))
        tensor.fill(read, start, buffer)
        write_from(targets, target, offset + start * width, buffer)


def adapter_config(
    ranks: Mapping[str, int],
    *,
    base: str | None,
    revision: str | None = None,
    turned: bool = False,
    whole: Sequence[str] = (),
    biases: bool = False,
    task_type: str | None = None,
    parameters: Mapping[str, int] | None = None,
    version: str | None = None,
) -> dict[str, Any]:
    """What PEFT needs to know; the scale of every module is 1.

    Args:
        ranks: by the modules' full names.
        base: the model that the adapter belongs to.
        whole: modules that the adapter replaces.
        biases: whether it replaces biases.
        parameters: ranks of experts' parameters, by their full names.
        version: of PEFT, whose order their factors have.
    """
    stacks = dict(parameters or {})
    counts = sorted([*ranks.values(), *stacks.values()])
    usual = max(counts, key=lambda rank: (counts.count(rank), rank), default=1)
    # The longest first: PEFT takes the first pattern that is the end of a name.
    every = sorted({**ranks, **stacks}.items(), key=lambda item: (-len(item[0]), item))
    other = {name: rank for name, rank in every if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": turned,
        "target_modules": list(ranks),
        "rank_pattern": other,
        "alpha_pattern": other,
        "modules_to_save": list(whole) or None,
        **({"target_parameters": list(stacks), "peft_version": version} if stacks else {}),
    }
