"""The recipe as data: frozen, typed, with the place of every key kept for later messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from merge_cli.errors import Problem
from merge_cli.recipe.automatic import Budget
from merge_cli.recipe.data import Data
from merge_cli.recipe.fields import CODES
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.output import AdapterOutput
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.search import Search
from merge_cli.recipe.statistics import Statistics
from merge_cli.recipe.tokenizer import TokenizerSpec
from merge_cli.recipe.training import Training
from merge_cli.recipe.training_presets import preset
from merge_cli.recipe.values import Parameter

Parameters = Mapping[str, Parameter]
Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class SourceSpec:
    """One source model. `layer_range` is half-open; None means every layer.

    `data` is what the source is good at, for methods that learn or look at examples.
    """

    model: ModelRef
    key: str
    parameters: Parameters = field(default_factory=dict)
    layer_range: tuple[int, int] | None = None
    data: Data | None = None


@dataclass(frozen=True)
class SliceSpec:
    """A run of output layers and the sources that it is merged from.

    `outer` are the parameters of the module that it belongs to, which its own win over;
    `base_model` stands in for the recipe's.
    """

    sources: tuple[SourceSpec, ...]
    key: str
    parameters: Parameters = field(default_factory=dict)
    outer: Parameters = field(default_factory=dict)
    base_model: ModelRef | None = None


@dataclass(frozen=True)
class ModuleSpec:
    """A part of a multimodal model, merged by itself.

    Attributes:
        slices: its layers; one without layer ranges where it lists `models`.
    """

    name: str
    key: str
    slices: tuple[SliceSpec, ...]
    parameters: Parameters = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether it lists models, not slices of them."""
        return all(
            s.layer_range is None for output_slice in self.slices for s in output_slice.sources
        )


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Exactly one of `models`, `slices` and `modules` is non-empty.

    Attributes:
        dtype: dtype of the output; None keeps each tensor's own. Computing is float32 regardless.
        out_dtype: wins over `dtype`; or codes of few bits, of the matrices of layers alone.
        training: how coefficients are learned; None leaves it to the method's defaults.
        statistics: how sources are looked at first; None leaves it to the defaults.
        statistics_folder: the folder of what was gathered before, as written.
        tokenizer: the output's vocabulary; None merges rows by number, as they are.
        chat_template: auto, a built-in name, a .jinja file, or Jinja; None keeps the tokenizer's.
        coefficients: the file of learned coefficients that the method merges with, as written.
        inputs: model as written -> digest of its headers, in a resolved recipe: they must match.
        eval: what to evaluate the result on, still to be read (`evaluation.parse`).
        search: whose parameters are searched, and how; None leaves it to the defaults.
        objective: what candidates are judged by, still to be read (`evolve.objectives`).
        budget: what trying methods may cost; None is no limit.
        methods: that are tried; empty for all.
        output: the result is an adapter, of adapters; None for a model.
        engine: what merges, local or ray; it changes no byte, and is in no resolved recipe.
        file: the recipe as messages name it; `folder` is where its relative paths start.
        positions: key path -> (line, column), for messages of later stages.
        warnings: one line for each key that is known, accepted and without effect.
        notes: one line for each thing that the plan's reader should know of how it was read.
        sweep: variants by name, of which this is the first; empty for a recipe of one result.
        stages: the other documents of the file, each before those that use it (documents.py).
    """

    merge_method: str
    base_model: ModelRef | None = None
    models: tuple[SourceSpec, ...] = ()
    slices: tuple[SliceSpec, ...] = ()
    modules: tuple[ModuleSpec, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = 0
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    name: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    training: Training | None = None
    statistics: Statistics | None = None
    statistics_folder: str | None = None
    coefficients: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    eval: Node | None = None
    search: Search | None = None
    objective: Node | None = None
    budget: Budget | None = None
    methods: tuple[str, ...] = ()
    output: AdapterOutput | None = None
    engine: Engine = "local"
    file: str = ""
    folder: Path = field(default_factory=Path.cwd)
    positions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stages: tuple[Recipe, ...] = ()
    sweep: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def tokenizer_source(self) -> str | None:
        """Whose vocabulary the output has, as written; None: as the config."""
        return self.tokenizer.source if self.tokenizer else None

    @property
    def output_dtype(self) -> str | None:
        """Of what is not in codes: `out_dtype` before `dtype`; None keeps each tensor's own."""
        return self.dtype if self.quantises else self.out_dtype or self.dtype

    @property
    def quantises(self) -> bool:
        """Whether matrices of layers are written in codes of few bits."""
        return self.out_dtype in CODES

    @property
    def source_specs(self) -> tuple[SourceSpec, ...]:
        """Every source, in the order of the recipe."""
        return self.models or tuple(
            s for output_slice in self.all_slices for s in output_slice.sources
        )

    @property
    def all_slices(self) -> tuple[SliceSpec, ...]:
        """The recipe's slices, or those of its modules."""
        return self.slices or tuple(
            output_slice for module in self.modules for output_slice in module.slices
        )

    @property
    def references(self) -> tuple[ModelRef, ...]:
        """Every model, each once, the base first."""
        bases = [self.base_model, *(output_slice.base_model for output_slice in self.all_slices)]
        listed = [*filter(None, bases), *(spec.model for spec in self.source_specs)]
        return tuple(dict.fromkeys(listed))

    def of_slice(self, slice_: SliceSpec | None) -> Recipe:
        """The recipe as it stands for a slice: with its base."""
        return replace(self, base_model=slice_.base_model) if slice_ and slice_.base_model else self

    def with_seed(self, seed: int) -> Recipe:
        """The same recipe, and its stages, with another seed."""
        stages = tuple(stage.with_seed(seed) for stage in self.stages)
        sweep = {name: variant.with_seed(seed) for name, variant in self.sweep.items()}
        return replace(self, seed=seed, stages=stages, sweep=sweep)

    def with_models(self, spelling: Mapping[ModelRef, ModelRef]) -> Recipe:
        """The same recipe with models named as `spelling` says."""

        def respelt(specs: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
            return tuple(replace(spec, model=spelling[spec.model]) for spec in specs)

        def sliced(parts: tuple[SliceSpec, ...]) -> tuple[SliceSpec, ...]:
            return tuple(
                replace(
                    part,
                    sources=respelt(part.sources),
                    base_model=spelling[part.base_model] if part.base_model else None,
                )
                for part in parts
            )

        return replace(
            self,
            base_model=spelling[self.base_model] if self.base_model else None,
            models=respelt(self.models),
            slices=sliced(self.slices),
            modules=tuple(replace(part, slices=sliced(part.slices)) for part in self.modules),
        )

    @property
    def learning(self) -> Training:
        """How coefficients are learned, with everything that the recipe leaves out."""
        training = self.training or preset("default")
        return training.resolved(has_base=self.base_model is not None)

    @property
    def searches(self) -> bool:
        """Whether parameters or members must be found before anything can be merged."""
        return self.objective is not None

    def with_result(self, method: str, **changes: Any) -> Recipe:
        """A static recipe with what a search has found."""
        return replace(self, merge_method=method, search=None, objective=None, **changes)

    def position_of(self, key: str) -> str:
        """A key path of this recipe with its file, line and column, as warnings name it."""
        return str(self.problem(key, ""))

    def problem(self, key: str, message: str, hint: str = "") -> Problem:
        """A problem at a key path of this recipe, with its line and column."""
        line, column = self.positions.get(key, (0, 0))
        return Problem(message, key, self.file, line, column, hint)
