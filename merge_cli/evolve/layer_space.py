"""The data-flow space: which layers of which models are stacked, in the order of a sequence.

Akiba et al., arXiv:2403.13187, section 3.2: the layers of all models, one model after the other,
`repeat` times; an indicator for each says whether it is in the result. What is found is a static
recipe with `slices:`, which the engine merges like any other. (The paper also scales the inputs of
layers that come from elsewhere; here tensors stay as they are.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.errors import RecipeError, UsageError
from merge_cli.evolve.space import Gene, Genome, Space
from merge_cli.recipe.schema import Recipe, SliceSpec, SourceSpec
from merge_cli.recipe.search import LayerSearch, SearchedParameter
from merge_cli.recipe.values import Scalar


@dataclass(frozen=True)
class _Block:
    """Neighbouring layers of one model, `start` to `end` (half-open), in one pass."""

    model: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class LayerSpace(Space):
    """One indicator for each block of the sequence: 1 takes it, 0 leaves it out.

    Args:
        layers: how many each model has.

    Attributes:
        least, most: layers that results have.

    Raises:
        RecipeError: bounds that no choice of blocks can keep.
    """

    def __init__(self, recipe: Recipe, layers: int) -> None:
        super().__init__(recipe, layers)
        section = self.search.layers or LayerSearch()
        self.least = section.min or (layers + 1) // 2
        self.most = section.max or max(self.least, (3 * layers + 1) // 2)
        self.blocks = tuple(
            _Block(model, start, min(start + section.block, layers))
            for _ in range(section.repeat)
            for model in range(len(recipe.models))
            for start in range(0, layers, section.block)
        )
        self._refuse_bounds(recipe, section)
        per_pass = len(self.blocks) // section.repeat
        self.genes = tuple(
            Gene(
                SearchedParameter(f"pass {i // per_pass + 1}", 0, 1, integer=True),
                block.model,
                group=i,
            )
            for i, block in enumerate(self.blocks)
        )

    def values(self, genome: Genome) -> list[Scalar]:
        """0 or 1 for each block: rounded, then changed where the result has too many layers or too
        few, beginning with the numbers nearest to changing by themselves."""
        taken = [bool(value) for value in super().values(genome)]
        order = sorted(range(len(genome)), key=lambda i: (genome[i], -i))
        for i in order:  # the least wanted first
            if self._height(taken) > self.most:
                taken[i] = False
        for i in reversed(order):
            room = self.most - self._height(taken)
            if self._height(taken) < self.least and not taken[i] and self.blocks[i].size <= room:
                taken[i] = True
        return [int(value) for value in taken]

    def recipe(self, genome: Genome) -> Recipe:
        """The static recipe: `slices:`, neighbours of one model as one slice."""
        pairs = zip(self.blocks, self.values(genome), strict=True)
        runs: list[_Block] = []
        for block in (block for block, is_taken in pairs if is_taken):
            last = runs[-1] if runs else None
            if last and (last.model, last.end) == (block.model, block.start):
                runs[-1] = _Block(block.model, last.start, block.end)
            else:
                runs.append(block)
        slices = tuple(
            SliceSpec(
                (
                    SourceSpec(
                        self.base.models[run.model].model,
                        f"slices[{i}].sources[0]",
                        layer_range=(run.start, run.end),
                    ),
                ),
                f"slices[{i}]",
            )
            for i, run in enumerate(runs)
        )
        return self.base.with_result("passthrough", models=(), slices=slices, parameters={})

    def whole(self, model: int) -> list[float]:
        """The genome that is one of the models."""
        per_pass = self.layers * len(self.base.models)
        seen, values = 0, []
        for gene, block in zip(self.genes, self.blocks, strict=True):
            values.append(gene.number(int(block.model == model and seen < per_pass)))
            seen += block.size
        return values

    def describe(self, gene: Gene) -> str:
        """`math, layers 0 to 1, pass 2`."""
        assert gene.model is not None, "each block is of one model"
        assert gene.group is not None, "each block has a place"
        block = self.blocks[gene.group]
        several = f"layers {block.start} to {block.end - 1}"
        layers = several if block.size > 1 else f"layer {block.start}"
        repeats = self.search.layers is not None and self.search.layers.repeat > 1
        return f"{self.labels[gene.model]}, {layers}" + (
            f", {gene.searched.name}" if repeats else ""
        )

    def start_from(self, recipe: Recipe) -> list[float]:
        """Refused: one stack of layers has several genomes.

        Raises:
            UsageError: always.
        """
        message = "a search of layers does not start from a recipe"
        hint = "Use best, middle, or the search_journal.jsonl of an earlier search."
        raise UsageError(message, where=recipe.file, hint=hint)

    def _height(self, taken: Sequence[bool]) -> int:
        pairs = zip(self.blocks, taken, strict=True)
        return sum(block.size for block, is_taken in pairs if is_taken)

    def _refuse_bounds(self, recipe: Recipe, section: LayerSearch) -> None:
        total = sum(block.size for block in self.blocks)
        key, message = "", ""
        if section.block > self.layers:
            key, message = "block", f"{section.block} layers of {self.layers}."
        elif self.least > self.most:
            key, message = "max", f"{self.most} layers, and min is {self.least} by default."
        elif self.least > total:
            key, message = "min", f"{self.least} layers, and the sequence has {total}."
        elif self.most - self.least < section.block - 1:  # else blocks of every size fit between
            key, room = "block", section.block - 1
            message = f"max must be above min ({self.least}) by {room} (got {self.most})."
        if message:
            raise RecipeError([recipe.problem(f"search.layers.{key}", message)])
