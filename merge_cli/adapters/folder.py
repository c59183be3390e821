"""Writing an adapter's folder as PEFT reads it: weights, config, card.

    adapter_config.json
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight, ...lora_B.weight, ...
    README.md

The size of the weights file is known when the last rank is. Until then factors wait in a second
file, so that memory holds those of one module. The folder is made in a workspace and renamed to OUT
when it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from merge_cli.sources.source import Source
from merge_cli.system.raw_io import FilePool, allocate, copy_range, write_error, write_from

if TYPE_CHECKING:
    from merge_cli.adapters.extracted import ExtractedAdapter


_WAITING = "factors.waiting"
_BLOCK = 2**22  # elements of a tensor that is copied


class AdapterFolder:
    """An adapter's files, written step by step: `add`, `keep` and `put`, then `finish`.

    Args:
        path: exists, and is empty.
        transposed: layers are stored [in, out], and so is the whole adapter.
    """

    def __init__(self, path: Path, *, transposed: bool = False) -> None:
        self._path, self._turned = path, transposed
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
        if embedding:  # (B A)^T, however layers are stored
            self.put(f"{module}.lora_embedding_A", factors.transposed.right)
            self.put(f"{module}.lora_embedding_B", factors.transposed.left)
        else:
            stored = factors.transposed if self._turned else factors  # stored [in, out]: (B A)^T
            self.put(f"{module}.lora_A.weight", stored.right)
            self.put(f"{module}.lora_B.weight", stored.left)
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
        """Close the file, finished or not."""
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
    targets: Sequence[str] | str | None = None,
    base: str | None,
    revision: str | None = None,
    transposed: bool = False,
    saved: Sequence[str] = (),
    biases: bool = False,
    task_type: str | None = None,
    parameters: Mapping[str, int] | None = None,
    version: str | None = None,
) -> dict[str, Any]:
    """adapter_config.json; the scale of every module is 1.

    Args:
        ranks: by the modules' full names.
        targets: how PEFT finds these modules, where their names are not enough.
        base: the model that the adapter belongs to.
        saved: modules that the adapter replaces.
        biases: whether it replaces biases.
        parameters: ranks of experts' parameters, by their full names.
        version: of PEFT, which decides how experts' factors are ordered.
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
        "fan_in_fan_out": transposed,
        "target_modules": targets or list(ranks),
        "rank_pattern": other,
        "alpha_pattern": other,
        "modules_to_save": list(saved) or None,
        **({"target_parameters": list(stacks), "peft_version": version} if stacks else {}),
    }


def extraction_card(plan: Plan, extracted: ExtractedAdapter, cut: RankTruncation) -> str:
    """The card of a fine-tune's extracted change."""
    base, tuned = (plan.sources[i] for i in (plan.base or 0, plan.operands[0]))
    repository = next((repository.repo_id for repository in repositories(base)), None)
    front = _front_matter(repository, [tuned])
    ranks = [change.rank for change in extracted.changes if change.rank is not None]
    size = _of_ranks(ranks) if ranks else "no factors"
    text = [
        f"What `{tuned.label}` has changed of `{base.label}`, extracted by merge-cli: {size} "
        f"(cut at {cut}), {100 * extracted.share:.1f} % of the change's sum of squares.",
        *(
            # What a reader of the card cannot do is not in it: which option would have helped.
            f"Left out, {100 * share:.1f} % of the change: {why.partition(': --')[0]}."
            for why, (_, share) in extracted.left_out().items()
        ),
    ]
    return card(front, extracted.path.name, text, base.label)


def merge_card(plan: Plan, base: str | None, title: str, report: Mapping[str, Any]) -> str:
    """The card of merged adapters."""
    adapter = report["adapter"]
    front = _front_matter(base if base and hub_id(base) else None, plan.sources)
    labels = [source.label for source in plan.sources if source.adapter]
    sources = ", ".join(f"`{label}`" for label in short_labels(labels))
    ranks = [module["rank"] for module in adapter["modules"].values()] or [0]
    text = [
        f"A {plan.recipe.merge_method} merge of the adapters {sources}, made by merge-cli without "
        f"their base model: {_of_ranks(ranks)}, "
        f"{100 * adapter['share']:.1f} % of the merged change's sum of squares.",
        "",
        "## Recipe",
        "",
        f"```yaml\n{report['recipe']['text'].strip()}\n```",
    ]
    return card(front, title, text, base)


def _of_ranks(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"rank {low} to {high}"


def _front_matter(base: str | None, sources: Iterable[Source]) -> dict[str, Any]:
    """The base on the Hub, and the licence where all sources have the same."""
    front = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    cards = (card for source in sources for card in source_cards(source))
    licences = {str(card.get("license")) for card in cards if card.get("license")}
    return {**front, "license": licences.pop()} if len(licences) == 1 else front


def card(front: Mapping[str, Any], title: str, text: Sequence[str], base: str | None) -> str:
    """Front matter, title, text and how to use it."""
    metadata = {**front, "library_name": "peft", "tags": ["lora", "merge-cli"]}
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
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
        f"model = PeftModel.from_pretrained(base, {json.dumps(title)})  # this folder",
        "```",
        "",
    ]
    return "\n".join(lines)


@contextmanager
def adapter_output(
    out: Path, *, overwrite: bool, protected: Sequence[Path], inputs: Inputs, fresh: bool = False
) -> Iterator[Path]:
    """A folder to write into: renamed to OUT at the end, discarded after an error.

    Args:
        inputs: files that are read meanwhile, and must be unchanged at the end.
        fresh: discard the working files of another command.

    Raises:
        SourceError: an input has changed.
        UsageError: OUT exists, or holds an input.
        ResourceError: another process writes there, or it cannot be written.
        Interrupted: Ctrl-C.
    """
    with OutputWorkspace(out) as work:
        work.refuse(overwrite, list(protected))
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
