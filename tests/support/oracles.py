"""Naive float64 oracles for the merge methods, written from the papers and nothing else.

Each function says the same thing as its formula, one entry at a time, and is slow on purpose:
the streaming engine is tested against these. Nothing here is imported from merge_cli. Inputs are
float64 arrays of any shape (one tensor) unless said otherwise; a result has the shape of the first
array given. Sums over sources run left to right from 0.0, so that "a sum of exactly 0" has a
definite meaning. The maths is in shared/methods.md; storage rounding is `rounded`, at the end.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Dtype = Literal["bfloat16", "float16", "float32"]

TINY_DIVISOR = 1e-8  # TIES with normalize: a sum of agreeing weights below this divides by 1


def _entries(x: NDArray[Any]) -> list[float]:
    """The entries of x in C order as Python floats."""
    return [float(v) for v in np.asarray(x, dtype=np.float64).reshape(-1)]


def _shaped(entries: Sequence[float], like: NDArray[Any]) -> Array:
    return np.array(entries, dtype=np.float64).reshape(np.asarray(like).shape)


def _delta(model: Array, base: Array) -> Array:
    if np.shape(model) != np.shape(base):
        raise ValueError(f"shapes differ: model {np.shape(model)}, base {np.shape(base)}")
    return np.asarray(model, dtype=np.float64) - np.asarray(base, dtype=np.float64)


def _sign(x: float) -> int:
    return int(x > 0) - int(x < 0)


def _sum(terms: Sequence[float]) -> float:
    """Left to right from 0.0, uncompensated (the builtin sum compensates from Python 3.12 on)."""
    total = 0.0
    for term in terms:
        total += term
    return total


def _same_count(**lists: Sequence[Any]) -> None:
    if len({len(values) for values in lists.values()}) != 1:
        sizes = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"need one entry a source in every list (got {sizes})")


def _weighted_sum(tensors: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """sum_i w_i x_i, with normalize divided by sum_i w_i; a sum of exactly 0 is a ValueError."""
    _same_count(tensors=tensors, weights=weights)
    total = _sum(weights)
    if normalize and total == 0.0:
        raise ValueError("weights sum to 0 and normalize is true")
    columns = zip(*(_entries(x) for x in tensors), strict=True)
    sums = [_sum([w * v for w, v in zip(weights, column, strict=True)]) for column in columns]
    return _shaped([s / total if normalize else s for s in sums], tensors[0])


def soup(models: list[Array], weights: list[float], normalize: bool = True) -> Array:
    """Weighted average of models: sum_i w_i theta_i / sum_i w_i, without normalize the sum alone.

    Model Soups, arXiv:2203.05482, section 2 (uniform soup: every w_i = 1/k).
    Raises ValueError when the weights sum to exactly 0 and normalize is true.
    """
    return _weighted_sum(models, weights, normalize)


def task_arithmetic(
    base: Array,
    models: list[Array],
    weights: list[float],
    lam: float = 1.0,
    normalize: bool = False,
) -> Array:
    """theta_0 + lambda sum_i w_i tau_i, with tau_i = theta_i - theta_0.

    Task arithmetic, arXiv:2212.04089, section 2 (task vector tau; theta_new = theta + lambda tau)
    and its addition of task vectors (tau_new = sum_i tau_i); a negative w_i is its negation.
    With normalize (mergekit's, not the paper's) the sum is divided by sum_i w_i; ValueError if
    that is exactly 0.
    """
    deltas = [_delta(model, base) for model in models]
    return np.asarray(base + lam * _weighted_sum(deltas, weights, normalize))


def _kept(density: float, n: int) -> int:
    """How many of n entries a density keeps, as written: 0.29 of 100 is 29, not 28."""
    return int(Fraction(str(density)) * n)


def trim(delta: Array, density: float) -> Array:
    """The k = int(density n) entries of largest magnitude in this tensor, the rest set to 0.

    TIES-Merging, arXiv:2306.01708, section 4 and algorithm 1, step 1 (keep the top-k% by
    magnitude). Exactly k are kept: among equal magnitudes the lower flat index wins.
    """
    return trim_model([delta], density)[0]


def trim_model(deltas: list[Array], density: float) -> list[Array]:
    """`trim` over one whole source: k counts the entries of all tensors together.

    TIES-Merging, arXiv:2306.01708, algorithm 1, step 1 as the paper has it, where tau_t is the
    whole task vector. Among equal magnitudes the lower (tensor, flat index) wins.
    """
    flat = [_entries(delta) for delta in deltas]
    places = [(tensor, index) for tensor, values in enumerate(flat) for index in range(len(values))]
    largest_first = sorted(places, key=lambda place: (-abs(flat[place[0]][place[1]]), place))
    kept = set(largest_first[: _kept(density, len(places))])
    return [
        _shaped([v if (tensor, index) in kept else 0.0 for index, v in enumerate(values)], delta)
        for tensor, (values, delta) in enumerate(zip(flat, deltas, strict=True))
    ]


def ties(
    base: Array,
    models: list[Array],
    weights: list[float],
    densities: list[float],
    lam: float = 1.0,
    elect: Literal["weighted", "unweighted"] = "weighted",
    normalize: bool = True,
    divisor: Literal["weights", "count"] = "weights",
    zero: Literal["positive", "majority"] = "positive",
    majority_sign: int = 1,
    trimmed: list[Array] | None = None,
) -> Array:
    """Trim, elect sign, disjoint mean; theta_0 + lambda tau_m.

    TIES-Merging, arXiv:2306.01708, section 4 and algorithm 1:
      1. trim: tau^_i keeps the largest entries of tau_i (`trim`, on this tensor). A caller that
         trims over the whole model gives `trimmed`, and `densities` is then not looked at.
      2. elect: gamma = sgn(sum_i tau^_i), or with weighted election sgn(sum_i w_i tau^_i). A sum
         of exactly 0 elects +, or `majority_sign` (of the whole model) when zero is "majority".
      3. disjoint mean: over A = {i : the entry is non-zero and its sign is gamma}, that sign
         being of w_i tau^_i or of tau^_i as the election was: sum_A w_i tau^_i, and with
         normalize divided by sum_A w_i (divisor "weights"; by 1 where |sum_A w_i| < 1e-8) or by
         |A| ("count"; by 1 where A is empty).

    The paper: all w_i = 1, unweighted, count, majority, trimmed over the model. mergekit: the
    defaults.
    """
    _same_count(models=models, weights=weights, densities=densities)
    if trimmed is None:
        trimmed = [trim(_delta(m, base), k) for m, k in zip(models, densities, strict=True)]
    _same_count(trimmed=trimmed, weights=weights)
    merged = []
    for column in zip(*(_entries(delta) for delta in trimmed), strict=True):
        weighted = [w * d for w, d in zip(weights, column, strict=True)]
        votes = weighted if elect == "weighted" else list(column)
        gamma = _sign(_sum(votes))
        if gamma == 0:
            gamma = majority_sign if zero == "majority" else 1
        agreeing = [i for i, vote in enumerate(votes) if vote != 0 and _sign(vote) == gamma]
        result = _sum([weighted[i] for i in agreeing])
        if normalize and divisor == "weights":
            total = _sum([weights[i] for i in agreeing])
            result /= total if abs(total) >= TINY_DIVISOR else 1.0
        elif normalize:
            result /= max(len(agreeing), 1)
        merged.append(result)
    return np.asarray(base + lam * _shaped(merged, base))


def _drop_and_rescale(delta: Array, mask: Mask, density: float, rescale: str) -> Array:
    """DARE's delta^ for one source: 0 where the mask is False, the rest rescaled."""
    values = _entries(delta)
    kept = [bool(m) for m in np.asarray(mask).reshape(-1)]
    dropped = [v if keep else 0.0 for v, keep in zip(values, kept, strict=True)]
    if rescale == "density":
        # Divided only where kept: density 0 keeps nothing and is not a division by zero.
        return _shaped([v / density if v != 0 else 0.0 for v in dropped], delta)
    if rescale == "l1":
        before, after = math.fsum(map(abs, values)), math.fsum(map(abs, dropped))
        return _shaped([v * (before / after) if after > 0 else 0.0 for v in dropped], delta)
    if rescale == "none":
        return _shaped(dropped, delta)
    raise ValueError(f"'rescale' must be density, l1 or none (got {rescale!r})")


def dare(
    base: Array,
    models: list[Array],
    weights: list[float],
    densities: list[float],
    masks: list[Mask],
    lam: float = 1.0,
    rescale: Literal["density", "l1", "none"] = "density",
    normalize: bool = False,
) -> Array:
    """theta_0 + lambda sum_i w_i delta^_i, with delta^_i = m_i delta_i / density_i.

    DARE, arXiv:2311.03099, section 3 (drop: m ~ Bernoulli(p), delta~ = (1 - m) delta; rescale:
    delta^ = delta~ / (1 - p)), then its merge by task arithmetic. Here density = 1 - p and a mask
    is True where the entry is kept. rescale "l1" (mergekit) multiplies the kept entries by
    L1(before) / L1(after) over this tensor, 0 if nothing survives; "none" leaves them as they
    are. normalize divides by sum_i w_i (ValueError if exactly 0).
    """
    _same_count(models=models, weights=weights, densities=densities, masks=masks)
    sparse = [
        _drop_and_rescale(_delta(model, base), mask, density, rescale)
        for model, mask, density in zip(models, masks, densities, strict=True)
    ]
    return np.asarray(base + lam * _weighted_sum(sparse, weights, normalize))


def dare_ties(
    base: Array,
    models: list[Array],
    weights: list[float],
    densities: list[float],
    masks: list[Mask],
    lam: float = 1.0,
    rescale: Literal["density", "l1", "none"] = "density",
    elect: Literal["weighted", "unweighted"] = "weighted",
    normalize: bool = False,
    divisor: Literal["weights", "count"] = "weights",
    zero: Literal["positive", "majority"] = "positive",
    majority_sign: int = 1,
) -> Array:
    """DARE's delta^_i (arXiv:2311.03099, section 3) merged by steps 2 and 3 of TIES.

    No magnitude trim. Everything else as in `dare` and `ties` (arXiv:2306.01708, algorithm 1).
    """
    _same_count(models=models, weights=weights, densities=densities, masks=masks)
    sparse = [
        _drop_and_rescale(_delta(model, base), mask, density, rescale)
        for model, mask, density in zip(models, masks, densities, strict=True)
    ]
    return ties(
        base,
        models,
        weights,
        densities,
        lam=lam,
        elect=elect,
        normalize=normalize,
        divisor=divisor,
        zero=zero,
        majority_sign=majority_sign,
        trimmed=sparse,
    )


def slerp(a: Array, b: Array, t: float, threshold: float = 0.9995, eps: float = 1e-8) -> Array:
    """Spherical interpolation between a (t = 0) and b (t = 1), each flattened whole.

    Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, great arcs:
    sin((1-t) theta) / sin(theta) a + sin(t theta) / sin(theta) b. theta is the angle between the
    directions a/|a| and b/|b| (a vector with norm <= eps is used as it is), while the vectors that
    are combined keep their lengths. Nearly parallel or antiparallel, |cos theta| > threshold:
    (1-t) a + t b.
    """
    x, y = _entries(a), _entries(b)
    norm_x, norm_y = (math.sqrt(math.fsum(v * v for v in vector)) for vector in (x, y))
    u = [v / norm_x for v in x] if norm_x > eps else x
    v = [w / norm_y for w in y] if norm_y > eps else y
    cos = math.fsum(p * q for p, q in zip(u, v, strict=True))
    if abs(cos) > threshold:
        from_a, from_b = 1.0 - t, t
    else:
        theta = math.acos(max(-1.0, min(1.0, cos)))
        from_a = math.sin((1.0 - t) * theta) / math.sin(theta)
        from_b = math.sin(t * theta) / math.sin(theta)
    return _shaped([from_a * p + from_b * q for p, q in zip(x, y, strict=True)], a)


def passthrough(a: Array, scale: float = 1.0) -> Array:
    """scale * a. mergekit's `passthrough` (no paper)."""
    return _shaped([scale * v for v in _entries(a)], a)


def keep_mask(seed: int, source: int, name: str, n: int, density: float, start: int = 0) -> Mask:
    """DARE's keep mask for elements start..start+n-1 of one tensor of one source, shape (n,).

    m ~ Bernoulli(density), arXiv:2311.03099, section 3, as a function of (seed, source, name,
    index) alone: a keyed 32-bit mixer (shape and constants of a low-bias hash found by
    "hash-prospector") on index mod 2^32, the key being BLAKE2b of the names and of index >> 32.
    Kept when the 32-bit value is below round(density 2^32).
    """
    threshold = round(density * 2**32)
    word = 2**32
    kept = []
    for index in range(start, start + n):
        chunk = index >> 32
        label = f"{seed}\x1f{source}\x1f{name}\x1f{chunk}"
        digest = hashlib.blake2b(label.encode(), digest_size=8).digest()
        k0 = int.from_bytes(digest[0:4], "little")
        k1 = int.from_bytes(digest[4:8], "little")
        x = index % word
        x ^= k0
        x ^= x >> 16
        x = x * 0x21F0AAAD % word
        x ^= x >> 15
        x = (x + k1) % word
        x = x * 0xD35A2D97 % word
        x ^= x >> 15
        x = x * 0x31848BAB % word
        x ^= x >> 14
        kept.append(x < threshold)
    return np.array(kept, dtype=np.bool_)


def gradient(values: list[float], position: float) -> float:
    """Piecewise linear through equally spaced anchors: values[0] at 0, values[-1] at 1.

    mergekit's per-layer gradients (no paper). position is in [0, 1], else ValueError; one value
    is a constant.
    """
    if not values or not 0.0 <= position <= 1.0:
        raise ValueError(f"need values and a position in [0, 1] (got {values}, {position})")
    place = position * (len(values) - 1)
    left = min(int(place), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    share = place - left
    return (1.0 - share) * values[left] + share * values[right]


def rounded(x: ArrayLike, dtype: Dtype) -> Array:
    """x as it is after storage: float64 -> float32 -> dtype, each to nearest, ties to even.

    IEEE 754-2019, section 4.3.1; bfloat16 is the upper half of a float32. Returned as float64.
    The two steps are what an engine that computes in float32 does; they differ from one direct
    rounding only next to a midpoint of dtype.
    """
    with np.errstate(over="ignore", under="ignore"):
        single = np.asarray(x, dtype=np.float64).astype(np.float32)
        if dtype == "float32":
            return np.asarray(single.astype(np.float64))
        if dtype == "float16":
            return np.asarray(single.astype(np.float16).astype(np.float64))
    if dtype != "bfloat16":
        raise ValueError(f"'dtype' must be bfloat16, float16 or float32 (got {dtype!r})")
    bits = single.view(np.uint32).astype(np.uint64)
    # Half of the lower part, less one when the last kept bit is 0: a midpoint then goes to even.
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    # A NaN must not carry into the sign or round to infinity.
    upper = np.where(np.isnan(single), 0x7FC00000, upper)
    return np.asarray(upper.astype(np.uint32).view(np.float32).astype(np.float64))


def ulp(x: ArrayLike, dtype: Dtype) -> Array:
    """Spacing of dtype in the binade that holds x (x itself is not rounded first).

    IEEE 754-2019, section 3.3: 2^(max(e, emin) - (p - 1)) with 2^e <= |x| < 2^(e+1); at 0 and in
    the subnormal range the smallest subnormal. NaN where x is not finite.
    """
    formats = {"bfloat16": (-126, 7), "float16": (-14, 10), "float32": (-126, 23)}
    emin, fraction_bits = formats[dtype]
    values = np.asarray(x, dtype=np.float64)
    spacing = []
    for v in _entries(values):
        if not math.isfinite(v):
            spacing.append(math.nan)
            continue
        e = math.frexp(v)[1] - 1 if v != 0 else emin
        spacing.append(2.0 ** (max(e, emin) - fraction_bits))
    return _shaped(spacing, values)


def gram(inputs: Sequence[ArrayLike]) -> Array:
    """X^T X over the number of rows, one token after another.

    RegMean, arXiv:2212.09849, section 3: G_i = X_i^T X_i. The division makes data sets of any size
    count alike; in the paper the number of examples is the same for all.
    """
    rows = [np.asarray(x, dtype=np.float64) for x in inputs]
    width = len(rows[0])
    total = np.zeros((width, width))
    for row in rows:
        for i in range(width):
            for j in range(width):
                total[i, j] += row[i] * row[j]
    return total / len(rows)


def regmean(
    layers: Sequence[Array], grams: Sequence[Array], alpha: float, weights: Sequence[float]
) -> Array:
    """(sum of w_i W_i G~_i) (sum of w_i G~_i)^-1 for layers [out, in].

    RegMean, arXiv:2212.09849, section 4 and algorithm 1: off-diagonal elements are multiplied by
    alpha. An input that is 0 in every G keeps the weighted mean of the layers.
    """
    out, width = np.shape(layers[0])
    below, above = np.zeros((width, width)), np.zeros((out, width))
    for layer, matrix, weight in zip(layers, grams, weights, strict=True):
        shrunk = np.zeros((width, width))
        for i in range(width):
            for j in range(width):
                shrunk[i, j] = matrix[i, j] * (1.0 if i == j else alpha)
        below += weight * shrunk
        above += weight * (np.asarray(layer, dtype=np.float64) @ shrunk)
    merged = np.zeros((out, width))
    used = [i for i in range(width) if below[i, i] > 0]
    for i in set(range(width)) - set(used):
        pairs = zip(weights, layers, strict=True)
        merged[:, i] = sum(w * np.asarray(one)[:, i] for w, one in pairs) / sum(weights)
    if used:
        merged[:, used] = above[:, used] @ np.linalg.inv(below[np.ix_(used, used)])
    return merged


def importance(gradients: Sequence[Array]) -> Array:
    """The diagonal of the empirical Fisher information: the mean of squared gradients.

    Matena and Raffel, arXiv:2111.09832, equation 4, with the data's own labels. One gradient for
    each example, of the log-likelihood of that example.
    """
    entries = [0.0] * np.asarray(gradients[0]).size
    for gradient in gradients:
        for i, g in enumerate(_entries(gradient)):
            entries[i] += g * g / len(gradients)
    return _shaped(entries, gradients[0])


def fisher(
    models: Sequence[Array], importances: Sequence[Array], weights: Sequence[float], epsilon: float
) -> Array:
    """sum of w_i (F_i + epsilon) theta_i / sum of w_i (F_i + epsilon), element by element.

    Matena and Raffel, arXiv:2111.09832, equation 3; epsilon stands for their code's floor.
    """
    merged = []
    for values in zip(*map(_entries, models), *map(_entries, importances), strict=True):
        thetas, fishers = values[: len(models)], values[len(models) :]
        above = below = 0.0
        for w, theta, f in zip(weights, thetas, fishers, strict=True):
            above += w * (f + epsilon) * theta
            below += w * (f + epsilon)
        merged.append(above / below)
    return _shaped(merged, models[0])
