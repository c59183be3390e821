"""Merges from stored bytes to stored bytes in one compiled call: what most recipes run.

Decoding, subtracting, dropping, averaging and encoding are passes over arrays of their own in the
plain way, and a block of four models does not fit into a core's cache. Here each tile of 2,048
elements goes the whole way while it lies there. A method says what its formula is in these terms
(`FusedForm`); the engine takes this way for bfloat16, float16 and float32, and the plain one for
everything else. Both write the same bytes: every operation is the plain one's, in its order.

Not for the eyes of users: a block that holds NaN or Inf, or a result that float16 cannot hold, is
left to the plain way, which says where it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.kernels.cut import Cuts
from merge_cli.kernels.elect import DivideBy
from merge_cli.kernels.keys import key_of
from merge_cli.kernels.mask import WORDS, mask_key, mask_limit

# As compiled/tiles.py numbers them.
FORMATS = {"BF16": 0, "F16": 1, "F32": 2}
DIVISORS: Mapping[DivideBy, int] = {"nothing": 0, "weights": 1, "count": 2}


@dataclass(frozen=True)
class Election:
    """How the sign of each element is elected: see `kernels.elect.disjoint_mean`."""

    weighted: bool
    divide_by: DivideBy
    zero_sign: float = 1.0


@dataclass(frozen=True)
class Masks:
    """Random drops: see `kernels.mask.drop`."""

    seed: int
    sources: Sequence[int]
    name: str
    density: Sequence[float]


@dataclass(frozen=True)
class Ranks:
    """Cuts by magnitude that the loop finds itself, in a tensor that is merged in one block.

    Attributes:
        counts: how many elements of each source are kept, the largest; None keeps the whole source.
    """

    counts: Sequence[int | None]


@dataclass(frozen=True)
class FusedForm:
    """A formula over one tensor, for all of its blocks.

    Attributes:
        weights: of each source. Products are added up in order.
        divisor: of the sum; 1 divides nothing. Without an election only.
        scale: what a change is multiplied by before it is added to the base. The sources are task
            vectors where the merge has a base, and there is no change where it has none.
        drop: random masks, or cuts by magnitude, or None: everything is kept. `Ranks` are for
            `kernels.streams` alone.
        factors: what is kept of each source is multiplied by; None for 1.
        election: signs are elected, and those that agree averaged.
    """

    weights: Sequence[float]
    divisor: float = 1.0
    scale: float = 1.0
    drop: Masks | Cuts | Ranks | None = None
    factors: Sequence[float] | None = None
    election: Election | None = None
    _rules: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)

    def rules(self, high: int) -> Any:
        """What is kept of each source, as the loops read it: numpy uint32 [sources, 4].

        Args:
            high: flat index >> 32, which a mask's key depends on.
        """
        import numpy as np

        if high not in self._rules:
            rows = self.rule_rows(high)
            self._rules[high] = np.array(rows, np.uint32).reshape(len(rows), 4)
        return self._rules[high]

    def rule_rows(self, high: int) -> list[tuple[int, int, int, int]]:
        """`rules` as numbers of Python's."""
        if self.drop is None:
            # An election has a rule for each source: here that all of it is kept.
            return [(0, 0, 0, 1)] * (len(self.weights) if self.election is not None else 0)
        if isinstance(self.drop, Ranks):
            nothing = int(key_of(math.inf))  # no number lies above it
            return [
                (0 if count else nothing, 0, 0, 0) if count is not None else (0, 0, 0, 1)
                for count in self.drop.counts
            ]
        if not isinstance(self.drop, Masks):
            return [
                (int(key_of(cut.threshold)), 0, 0, 0) if cut else (0, 0, 0, 1) for cut in self.drop
            ]
        keys = [mask_key(self.drop.seed, s, self.drop.name, high) for s in self.drop.sources]
        limits = [mask_limit(share) for share in self.drop.density]
        return [
            (*key, min(limit, WORDS - 1), limit >= WORDS)
            for key, limit in zip(keys, limits, strict=True)
        ]


@dataclass(frozen=True)
class StoredBlock:
    """One span of every input, as it is stored, in a worker's buffer.

    Attributes:
        stored: bytes of all inputs (numpy uint8); input i begins at starts[i], in format kinds[i].
        start, size: elements [start, start + size) of the tensor.
        based: the first input is the base.
    """

    stored: Any
    starts: Any
    kinds: Any
    start: int
    size: int
    based: bool

    @property
    def inputs(self) -> tuple[Any, ...]:
        """As compiled loops take it."""
        return self.stored, self.starts, self.kinds, self.size, self.based

    def part(self, begin: int, end: int) -> StoredBlock:
        """Elements [begin, end) of the block, at bytes of the same buffer."""
        import numpy as np

        widths = np.where(self.kinds == FORMATS["F32"], 4, 2)
        starts = self.starts + begin * widths
        return StoredBlock(
            self.stored, starts, self.kinds, self.start + begin, end - begin, self.based
        )


def merge(form: FusedForm, block: StoredBlock, dtype: str, out: Any) -> bool:
    """Merge a block into stored bytes of `dtype`.

    Args:
        out: numpy uint8, filled.

    Returns:
        whether that is the result. Else something is not finite, and the plain way has to look.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    high, low = divmod(block.start, WORDS)
    if low + block.size > WORDS:
        return False  # two keys for one block, once in 2^32 elements
    rules, factors = form.rules(high), _factors(form)
    weights, scale = np.array(form.weights, np.float32), np.float32(form.scale)
    kind = FORMATS[dtype]
    if form.election is None:
        seen = compiled.merge_linear(
            *block.inputs,
            weights,
            np.float32(form.divisor),
            scale,
            rules,
            factors,
            np.uint32(low),
            out,
            kind,
        )
        return not seen
    election = form.election
    seen = compiled.merge_disjoint(
        *block.inputs[:4],
        weights,
        election.weighted,
        DIVISORS[election.divide_by],
        np.float32(election.zero_sign),
        scale,
        rules,
        _ties(form, block),
        factors,
        np.uint32(low),
        out,
        kind,
    )
    return not seen


@dataclass
class StoredSums:
    """Sums of the report over stored blocks, for S sources; see `engine.merge_stats`.

    Attributes:
        counts: elements in conflict, then what is kept of each source.
        squares: of the base, and of what is merged less the base.
    """

    gram: Any
    both: Any
    agree: Any
    counts: Any
    squares: Any

    @classmethod
    def empty(cls, sources: int, *tensors: int) -> StoredSums:
        """Zeros; with a number of tensors, for each of so many."""
        import numpy as np

        both, agree = np.zeros((2, *tensors, sources, sources), np.int64)
        counts = np.zeros((*tensors, 1 + sources), np.int64)
        gram, squares = np.zeros((*tensors, sources, sources)), np.zeros((*tensors, 2))
        return cls(gram, both, agree, counts, squares)

    def each(self) -> Iterator[StoredSums]:
        """Those of each tensor among several."""
        return map(StoredSums, self.gram, self.both, self.agree, self.counts, self.squares)


def measure(form: FusedForm, block: StoredBlock, sums: StoredSums, *, pairs: bool) -> None:
    """Add the sums of a block whose inputs are finite, and which `merge` has merged.

    Args:
        pairs: dot products and signs of every pair of sources, not of each source alone.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    merged = np.empty(block.size, np.float32)
    if block.based:  # what it is compared with is not rounded
        merge(form, block, "F32", merged.view(np.uint8))
    high, low = divmod(block.start, WORDS)
    compiled.measure_stored(
        block.stored,
        block.starts,
        block.kinds,
        0,
        block.size,
        block.based,
        merged,
        pairs,
        form.rules(high),
        _ties(form, block),
        np.uint32(low),
        sums.gram,
        sums.both,
        sums.agree,
        sums.counts,
        sums.squares,
    )


def stored_starts(sizes: Sequence[int], dtypes: Sequence[str]) -> tuple[Any, Any]:
    """Where each input's bytes begin if they lie one after another, and how each is encoded."""
    import numpy as np

    widths = [size * width_of(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    # Each begins on a multiple of 64 bytes: of a vector, and of a float32.
    padded = [-(-width // 64) * 64 for width in widths]
    starts = np.concatenate([[0], np.cumsum(padded)]).astype(np.int64)
    return starts, np.array([FORMATS[dtype] for dtype in dtypes], np.int64)


def _ties(form: FusedForm, block: StoredBlock) -> Any:
    import numpy as np

    if form.drop is None or isinstance(form.drop, Masks | Ranks):
        return np.empty(0, np.int64)
    ties = [0 if cut is None else cut.ties(block.start, block.size) for cut in form.drop]
    return np.array(ties, np.int64)


def _factors(form: FusedForm) -> Any:
    import numpy as np

    if form.factors is None:
        return np.ones(len(form.weights), np.float32)
    return np.array(form.factors, np.float32)
