"""An adapter's folder as PEFT reads it: factors as they come, then config and one weights file.

    adapter_config.json
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight, ...lora_B.weight, ...

How large the file becomes is known when the last rank is. Until then factors wait in a file beside
it, so that memory holds those of one module.

The card of an adapter that was made here.

The folder of an adapter: made beside OUT, and OUT when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merge_cli.adapters.factors import Factors, RankTruncation
from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.layout import OutputTensor, lay_out
from merge_cli.checkpoint.tensors import Read, Tensor
from merge_cli.engine.inputs import Inputs
from merge_cli.engine.output import OutputWorkspace
from merge_cli.errors import Interrupted
from merge_cli.lora.adapter import PREFIX, WEIGHTS
from merge_cli.lora.config import CONFIG
from merge_cli.planning.plan import Plan
from merge_cli.recipe.reference import hub_id, short_labels
from merge_cli.report.card import repositories, source_cards
from merge_cli.system.raw_io import FilePool, allocate, copy_range, write_error, write_from

if TYPE_CHECKING:
    from merge_cli.adapters.extract import ExtractedAdapter


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
    width = width_of(tensor.dtype)
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


def extraction_card(plan: Plan, result: ExtractedAdapter, cut: RankTruncation) -> str:
    """Of a fine-tune's change."""
    base, tuned = (plan.sources[i] for i in (plan.base or 0, plan.operands[0]))
    front: dict[str, Any] = {}
    named = [repository.repo_id for repository in repositories(base)]
    if named:
        front |= {"base_model": named[0], "base_model_relation": "adapter"}
    licences = {str(card.get("license")) for card in source_cards(tuned) if card.get("license")}
    if len(licences) == 1:
        front["license"] = licences.pop()
    ranks = [change.rank for change in result.changes if change.rank is not None]
    size = f"rank {min(ranks)} to {max(ranks)}" if ranks else "no factors"
    text = [
        f"What `{tuned.label}` has changed of `{base.label}`, extracted by merge-cli: {size} "
        f"(cut at {cut}), {100 * result.share:.1f} % of the change's sum of squares.",
        *_left_out(result),
    ]
    return card(front, result.path.name, text, base.label)


def merge_card(plan: Plan, base: str | None, title: str, report: Mapping[str, Any]) -> str:
    """Of adapters that were merged."""
    about = report["adapter"]
    front: dict[str, Any] = {}
    if base and hub_id(base):
        front |= {"base_model": base, "base_model_relation": "adapter"}
    licences = {
        str(card.get("license"))
        for source in plan.sources
        for card in source_cards(source)
        if card.get("license")
    }
    if len(licences) == 1:
        front["license"] = licences.pop()
    labels = [source.label for source in plan.sources if source.adapter]
    sources = ", ".join(f"`{label}`" for label in short_labels(labels))
    ranks = [module["rank"] for module in about["modules"].values()] or [0]
    text = [
        f"A {plan.recipe.merge_method} merge of the adapters {sources}, made by merge-cli without "
        f"the model that they are of: rank {min(ranks)} to {max(ranks)}, "
        f"{100 * about['share']:.1f} % of the merged change's sum of squares.",
        "",
        "## Recipe",
        "",
        f"```yaml\n{report['recipe']['text'].strip()}\n```",
    ]
    return card(front, title, text, base)


def card(front: Mapping[str, Any], title: str, text: Sequence[str], base: str | None) -> str:
    """Front matter, title, text and how to use it."""
    known = {**front, "library_name": "peft", "tags": ["lora", "merge-cli"]}
    lines = [
        "---",
        yaml.safe_dump(known, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {title}",
        "",
        *text,
        "",
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base or 'BASE')})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(title)})",
        "```",
        "",
    ]
    return "\n".join(lines)


def _left_out(result: ExtractedAdapter) -> list[str]:
    total = sum(change.squares for change in result.changes) or 1.0
    reasons: dict[str, float] = {}
    for change in result.changes:
        if change.why:
            reasons[change.why] = reasons.get(change.why, 0.0) + change.squares / total
    return [
        f"Left out, {100 * share:.1f} % of the change: {why}." for why, share in reasons.items()
    ]


@contextmanager
def adapter_output(
    out: Path, *, overwrite: bool, precious: Sequence[Path], inputs: Inputs, fresh: bool = False
) -> Iterator[Path]:
    """A folder to write into, published at the end; thrown away after an error.

    Args:
        inputs: what is read meanwhile, and must be the same at the end.
        fresh: throw away what other work has left.

    Raises:
        SourceError: something that was read has changed.
        UsageError: OUT exists, or holds what is needed.
        ResourceError: another process writes there, or it cannot be written.
        Interrupted: Ctrl-C.
    """
    with OutputWorkspace(out) as work:
        work.refuse(overwrite, list(precious))
        if not fresh:
            work.refuse_other_work("an adapter")
        work.discard()
        try:
            work.begin("an adapter")
            yield work.model
            inputs.verify()
            work.publish()
        except OSError as error:
            raise write_error(error, work.model) from error
        except KeyboardInterrupt:
            raise Interrupted("stopped", where=str(out), hint="Nothing was written.") from None
        finally:
            work.discard()
