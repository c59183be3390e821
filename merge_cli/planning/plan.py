"""The plan of a merge: what happens to every tensor, known before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from merge_cli.checkpoint.coefficients import CoefficientFile
from merge_cli.checkpoint.dtypes import DTYPES, MERGEABLE, promoted
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.layout import OutputTensor, Shard
from merge_cli.checkpoint.statistics import CalibrationStatistics, TensorStatistics
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.formats.encoding import Encoding, Verbatim
from merge_cli.lora.adapter import WEIGHTS
from merge_cli.methods.method import Method
from merge_cli.planning import totals
from merge_cli.planning.equal_tensors import Copies, Integers
from merge_cli.planning.layers import layer_key_of
from merge_cli.planning.matches import TensorMatch
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source
from merge_cli.tokenizer.aligned import AlignedVocabulary
from merge_cli.tokenizer.chat_template import ChosenTemplates

Action = Literal["merge", "copy"]


_NO_PARAMETERS: Mapping[str, Any] = {}


class TensorTask(NamedTuple):
    """One output tensor. A tuple, as there may be 100,000 (see `headers.TensorRef`).

    Attributes:
        dtype: safetensors dtype of the output; of one in codes, what its encoding is called.
        action: `merge` runs the method; `copy` takes the one operand as it is.
        operands: the sources' tensors, in the order of the method's formula.
        sources: for each operand, its index in `Plan.sources`.
        ids: for each operand, its place in the recipe: what a random mask belongs to.
        base: the base's tensor, where the formula has one.
        parameters: resolved, by the recipe's names; tensors that are treated alike share one.
        group: what the report sums over: the layer (`model.layers.7`), or the tensor's own name.
        note: what a reader should know; often empty.
        position: the layer's place in its slice, 0 to 1: where a gradient is evaluated.
        encoding: how it is stored in codes; None for plain numbers.
        kept: what is stored in that encoding already: blocks that are the same numbers stay.
        copy_of: the tensor that it is a copy of (tied weights), made by the same formula; often
            empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Action
    operands: tuple[Tensor, ...]
    sources: tuple[int, ...]
    ids: tuple[int, ...]
    base: Tensor | None = None
    parameters: Mapping[str, Any] = _NO_PARAMETERS
    group: str = ""
    note: str = ""
    position: float = 0.0
    encoding: Encoding | None = None
    kept: Tensor | None = None
    copy_of: str = ""

    @property
    def formula_name(self) -> str:
        """What decides over settings and random numbers: of a copy, the name of what it copies."""
        return self.copy_of or self.name

    @property
    def moved(self) -> bool:
        """Whether its bytes are the operand's: any other is computed, or rounded to a dtype."""
        if self.encoding is not None:
            return isinstance(self.encoding, Verbatim)
        return self.action == "copy" and is_stored_as(self.operands[0], self.dtype)

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """What is written for it: the tensor, or the parts that it is stored in."""
        if self.encoding is None:
            return (OutputTensor(self.name, self.dtype, self.shape),)
        return tuple(part.output(self.name) for part in self.encoding.parts(self.shape))

    @property
    def bytes_written(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.operands[0].size

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Everything that is read for it, the base first."""
        return (self.base, *self.operands) if self.base else self.operands

    @property
    def bytes_read(self) -> int:
        return sum(part.nbytes for ref in self.inputs for part in ref.stored)


def outputs_of(tasks: Sequence[TensorTask]) -> list[OutputTensor]:
    """What is written for all of them, in their order."""
    if any(map(attrgetter("encoding"), tasks)):
        return [output for task in tasks for output in task.outputs]
    fields = zip(*(map(attrgetter(name), tasks) for name in OutputTensor._fields), strict=True)
    return [*map(partial(tuple.__new__, OutputTensor), fields)]


def is_stored_as(tensor: Tensor, dtype: str) -> bool:
    """Whether a tensor's bytes are what an output of this dtype has: then they can be copied."""
    return isinstance(tensor, TensorRef) and tensor.dtype == dtype


@dataclass(frozen=True)
class Plan:
    """A merge, decided.

    Attributes:
        sources: every opened model; the base among them, if there is one.
        base: index of the base in `sources`; None without a base.
        operands: indexes in `sources` of the models that are merged, in the recipe's order.
        config_index: of the source of config.json.
        aligned: the sources' tensors with one vocabulary, and who gives the tokenizer files.
        templates: the output's chat templates, where the recipe chooses them.
        tasks: every output tensor, in natural order of names.
        config: the output's config.json; empty where the config source has none.
        notes: decisions that a reader should know, one line each.
        coefficients: the recipe's file of learned coefficients; None without one.
        gathered: statistics of the sources over their data; None without, or before they are there.
        shard_size: bytes of tensors in one of `shards`: what is planned again is cut alike.
        stages: how the models are made that other documents of the recipe make, by name.
        variants: of a sweep, by name: what is written, while this plan's tasks say what is read.
        compared: stored tensors that are taken to be equal, to be compared before the merge.
    """

    recipe: Recipe
    method: Method
    sources: tuple[Source, ...]
    base: int | None
    operands: tuple[int, ...]
    config_index: int
    aligned: AlignedVocabulary
    tasks: tuple[TensorTask, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    coefficients: CoefficientFile | None = None
    shard_size: int = 0
    stages: Mapping[str, Plan] = field(default_factory=dict)
    templates: ChosenTemplates = ChosenTemplates()
    calibrated: CalibrationStatistics | None = None
    compared: tuple[Copies | Integers, ...] = ()
    variants: Mapping[str, Plan] = field(default_factory=dict)

    @property
    def tokenizer_index(self) -> int:
        """Index of who gives the tokenizer files."""
        return self.aligned.tokenizer_index

    def statistics_of(self, task: TensorTask) -> TensorStatistics | None:
        """What was gathered of a tensor in every source that it is merged from."""
        return self.calibrated.of(task.operands, task.ids) if self.calibrated is not None else None

    def is_plain_mean(self, task: TensorTask) -> bool:
        """Whether the method gathers, and has found nothing of this tensor in some source."""
        statistics = self.statistics_of(task)
        return statistics is not None and statistics.complete is None

    @property
    def bytes_read(self) -> int:
        return self.input_totals.nbytes

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.shards)

    def shards_read(self, source: int) -> set[str]:
        """The files of a source that the merge reads."""
        opened = self.sources[source]
        root = opened.root
        names = {
            path.relative_to(root).as_posix() for path in self._files_read if root in path.parents
        }
        return names & {opened.file} if opened.file else names  # others there are other sources'

    @property
    def downloads(self) -> dict[str, tuple[int, int]]:
        """Files and bytes that are still to be downloaded, by the source's label."""
        result = {}
        for index, source in enumerate(self.sources):
            adapter = source.adapter.repository if source.adapter is not None else None
            needed = [(source.repository, name) for name in self.shards_read(index)]
            needed += [(adapter, WEIGHTS)] if adapter is not None else []
            sizes = [r.files.get(n, 0) for r, n in needed if r is not None and not r.is_cached(n)]
            if sizes:
                result[source.label] = len(sizes), sum(sizes)
        return result

    @property
    def stored_inputs(self) -> Iterator[TensorRef]:
        """Every stored tensor that a task reads, as often as it is read."""
        return (ref for task in self.tasks for tensor in task.inputs for ref in tensor.stored)

    @cached_property
    def input_totals(self) -> totals.InputTotals:
        """What is read."""
        return totals.input_totals(self.tasks)

    @cached_property
    def _files_read(self) -> frozenset[Path]:
        """What tasks read, and what is compared before."""
        compared = (tensor for pair in self.compared for tensor in (pair.first, pair.second))
        files = {ref.path for tensor in compared for ref in tensor.stored}
        return self.input_totals.files | files

    @cached_property
    def parameter_count(self) -> int:
        return totals.element_count(self.tasks)

    @cached_property
    def computed(self) -> Sequence[TensorTask]:
        """The tasks whose bytes are not an operand's."""
        return totals.computed_of(self.tasks)

    @cached_property
    def computed_dtypes(self) -> frozenset[str]:
        """What they read, and what they write."""
        return totals.dtypes_of(self.computed)

    @cached_property
    def most_inputs(self) -> int:
        """How many tensors are read for one, at most."""
        return totals.most_inputs(self.tasks)


def merged_dtype(dtypes: Iterable[str]) -> str:
    """The dtype that a tensor of these has where the recipe names none."""
    different = {*dtypes}
    return different.pop() if len(different) == 1 else promoted(different)


def promotion_note(recipe: Recipe, tasks: Sequence[TensorTask]) -> Iterator[str]:
    """A line where sources of several dtypes make one that some of them do not have."""
    if recipe.output_dtype is not None:
        return
    mixed = [task for task in tasks if task.note.startswith("stored as ")]
    if mixed:
        widest = promoted({task.dtype for task in mixed if task.dtype in MERGEABLE} or {"F32"})
        yield (
            f"sources differ in dtype in {len(mixed)} tensors, written in the wider one "
            f"({DTYPES[widest][1]}), as mergekit does; `dtype:` chooses another"
        )


def input_names(match: TensorMatch) -> tuple[str, ...]:
    """The tensor's name in each operand's model, by that model's own layer numbers."""
    operands, layer = match.output_slice.operands, match.layer_position.layer
    key = layer_key_of(match.name) if layer is not None else None
    if key is None or layer is None:
        return (match.name,) * len(operands)
    return tuple(key.name((operand.layers or (0, 0))[0] + layer) for operand in operands)


def sliced_names(matches: Iterable[TensorMatch]) -> Iterator[str]:
    """The names that tensors of slices have in their sources: filters look at those, too."""
    for match in matches:
        if match.layer_position.layer is not None:
            yield from input_names(match)
