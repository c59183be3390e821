"""A plan that is being made: what the passes of `make_plan` have decided so far.

Each pass takes a draft and returns it with more of its fields decided; it reads what the passes
before it have decided, and nothing else. So a pass is tested with a draft of a few headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge_cli.checkpoint.coefficients import CoefficientFile
from merge_cli.checkpoint.statistics import CalibrationStatistics
from merge_cli.checkpoint.tensors import TensorMap
from merge_cli.methods.method import Method
from merge_cli.planning.equal_tensors import Copies, Integers
from merge_cli.planning.matches import TensorMatches
from merge_cli.planning.output_slices import OutputSlice
from merge_cli.planning.plan import TensorTask
from merge_cli.planning.stacked_kinds import Origins
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import Source
from merge_cli.tokenizer.aligned import AlignedVocabulary
from merge_cli.tokenizer.chat_template import ChosenTemplates


@dataclass(frozen=True)
class Draft:
    """A plan as far as it is decided.

    Attributes:
        recipe: with one spelling for each model.
        method: the recipe's, for this recipe (see `Method.variant`).
        sources: every opened model, the base first; passes change the tensors that they have.
        slices: the parts of the output, in order.
        copy_of: an output tensor that is a copy of another (tied weights) -> that other.
        tensors: for each source, the tensors that it is taken to have, heads reconciled.
        tied: what config.json must say of the output head; None leaves it as it is.
        aligned: the same tensors in one vocabulary, and who gives the tokenizer files.
        matches: which tensors make which output tensor.
        tasks: every output tensor, in natural order of names.
        coefficients: the recipe's file of learned coefficients.
        calibrated: the recipe's folder of gathered statistics.
        stacked: the slices whose layers config.json counts.
        origins: where each of their layers comes from.
        config: the output's config.json.
        templates: the output's chat templates, where the recipe chooses them.
        compared: stored tensors that are taken to be equal, to be compared before the merge.
        notes: what a reader of the plan should know, in the order of the passes.
    """

    recipe: Recipe
    method: Method
    sources: tuple[Source, ...]
    slices: tuple[OutputSlice, ...] = ()
    copy_of: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[TensorMap, ...] = ()
    tied: bool | None = None
    aligned: AlignedVocabulary = AlignedVocabulary((), 0)
    matches: TensorMatches = field(default_factory=TensorMatches)
    tasks: tuple[TensorTask, ...] = ()
    coefficients: CoefficientFile | None = None
    calibrated: CalibrationStatistics | None = None
    stacked: tuple[OutputSlice, ...] = ()
    origins: Origins | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    templates: ChosenTemplates = ChosenTemplates()
    compared: tuple[Copies | Integers, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """The sources' names, as the recipe spells them."""
        return [source.label for source in self.sources]

    @property
    def base(self) -> int | None:
        """Index of the base; None without one."""
        base = self.recipe.base_model
        return self.labels.index(str(base)) if base else None

    @property
    def reference(self) -> int:
        """Index of the source whose names and layout the output has."""
        return self.slices[0].reference.source

    @property
    def config_index(self) -> int:
        """Index of the source that gives config.json: the base, else the model listed first."""
        return self.reference if self.base is None else self.base

    @property
    def tokenizer_source(self) -> Source:
        """The model that gives the tokenizer files."""
        return self.aligned.guest or self.sources[self.aligned.tokenizer_index]

    def noting(self, notes: Iterable[str], **decided: Any) -> Draft:
        """The draft with more notes, and with these fields decided."""
        return replace(self, notes=(*self.notes, *notes), **decided)

    def with_sources(self, sources: Sequence[Source], notes: Iterable[str]) -> Draft:
        """The draft with the sources' tensors under other names, or in another layout."""
        return self.noting(notes, sources=tuple(sources))
