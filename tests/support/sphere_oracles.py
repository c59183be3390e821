"""Naive float64 oracles for the methods that follow the paper's or mergekit's words step by step.

Vectors, not inner products; loops over elements; nothing is imported from merge_cli. Arguments are
float64 arrays of one tensor; a result has the first one's shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support import oracles

Array = Any


def nuslerp_vectors(t: float, a: Array, b: Array) -> Array:
    """Along the great circle through two vectors that keep their lengths."""
    lengths = [np.linalg.norm(x) for x in (a, b)]
    cos = float(a @ b / (lengths[0] * lengths[1])) if all(lengths) else 0.0
    theta = math.acos(max(-1.0, min(1.0, cos)))
    if math.sin(theta) ** 2 <= 1e-16:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def nuslerp(a: Array, b: Array, t: float, *, flatten: bool, row_wise: bool) -> Array:
    if flatten:
        return nuslerp_vectors(t, a.reshape(-1), b.reshape(-1)).reshape(a.shape)
    if a.ndim == 1:
        return nuslerp_vectors(t, a, b)
    out = np.empty_like(a)
    for i in range(a.shape[1 if row_wise else 0]):
        place: Any = (slice(None), i) if row_wise else i
        out[place] = nuslerp_vectors(t, a[place], b[place])
    return out


def multislerp(arrays: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """Tangents at the weighted mean, interpolated there, and back: step by step."""
    flat = [x.reshape(-1) for x in arrays]
    if len(flat) == 1:
        return arrays[0]
    w = np.array(weights) / (sum(weights) if normalize else 1.0)
    lengths = np.array([np.linalg.norm(x) for x in flat])
    units = [x / n if n else x for x, n in zip(flat, lengths, strict=True)]
    mean = sum(wi * u for wi, u in zip(w, units, strict=True))
    if np.linalg.norm(mean) < 1e-8:
        return sum(wi * x for wi, x in zip(w, flat, strict=True)).reshape(arrays[0].shape)
    mean = mean / np.linalg.norm(mean)
    tangent = sum(wi * (u - (u @ mean) * mean) for wi, u in zip(w, units, strict=True))
    size = np.linalg.norm(tangent)
    back = mean * math.cos(size) + (tangent * math.sin(size) / size if size else 0.0)
    return (float(lengths @ w) * back).reshape(arrays[0].shape)


def karcher(arrays: Sequence[Array], weights: Sequence[float], steps: int, tol: float) -> Array:
    flat = [x.reshape(-1) for x in arrays]
    w = np.array(weights) / sum(weights)
    lengths = [float(np.linalg.norm(x)) for x in flat]
    units = [x / n for x, n in zip(flat, lengths, strict=True)]
    mean = sum(wi * u for wi, u in zip(w, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for wi, u in zip(w, units, strict=True):
            dot = max(-1.0, min(1.0, float(u @ mean)))
            theta = math.acos(dot)
            if theta >= tol:
                tangent += wi * theta / math.sin(theta) * (u - dot * mean)
        size = float(np.linalg.norm(tangent))
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        mean /= np.linalg.norm(mean)
    scale = sum(wi * n for wi, n in zip(w, lengths, strict=True))
    return (scale * mean).reshape(arrays[0].shape)


def model_stock_vectors(base: Array, models: Sequence[Array]) -> Array:
    """t = K cos / (1 + (K-1) cos), cos the mean over pairs; t * average + (1-t) * base."""
    deltas = [m - base for m in models]
    count = len(models)
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            lengths = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
            cosines.append(float(deltas[i] @ deltas[j]) / max(float(lengths), 1e-6))
    cos = sum(cosines) / len(cosines)
    t = count * cos / (1 + (count - 1) * cos)
    return t * sum(models) / count + (1 - t) * base


def model_stock(base: Array, models: Sequence[Array], filter_wise: bool) -> Array:
    if not filter_wise or base.ndim == 1:
        flat = model_stock_vectors(base.reshape(-1), [m.reshape(-1) for m in models])
        return flat.reshape(base.shape)
    rows = [model_stock_vectors(base[i], [m[i] for m in models]) for i in range(len(base))]
    return np.stack(rows)


def nearswap(base: Array, other: Array, t: float) -> Array:
    def one(a: float, b: float) -> float:
        w = min(1.0, max(0.0, t / max(abs(a - b), 1e-6)))
        return w * b + (1 - w) * a

    return _each(one, base, other)


def ram(base: Array, models: Sequence[Array], epsilon: float, scales: Sequence[float]) -> Array:
    def one(b: float, *xs: float) -> float:
        moved = [(x - b, s) for x, s in zip(xs, scales, strict=True) if abs(x - b) > epsilon]
        if len(moved) == 1:
            return b + moved[0][0] * moved[0][1]
        return b + sum(d for d, _ in moved) / len(moved) if moved else b

    return _each(one, base, *models)


def ram_scales(
    base: Array, models: Sequence[Array], r: float, alpha: float, epsilon: float
) -> list[float]:
    moved = [np.abs(m - base) > epsilon for m in models]
    together = sum(m.astype(int) for m in moved)
    scales = []
    for own in moved:
        shared = int((own & (together > 1)).sum())
        alone = int((own & (together == 1)).sum())
        scales.append(1 + r * min(shared / max(alone, epsilon), alpha))
    return scales


def sce(base: Array, models: Sequence[Array], topk: float) -> Array:
    deltas = [(m - base).reshape(-1) for m in models]
    if topk < 1:
        variance = np.var(np.stack(deltas), axis=0)
        k = int(np.count_nonzero(variance) * topk)
        order = sorted(range(len(variance)), key=lambda i: (-variance[i], i))[:k]
        keep = np.zeros(len(variance), bool)
        keep[order] = True
        deltas = [np.where(keep, d, 0.0) for d in deltas]
    squares = [float(np.mean(d * d)) for d in deltas]
    whole = sum(squares)
    w = [s / whole for s in squares] if whole >= 1e-6 else [1 / len(deltas)] * len(deltas)

    def one(*ds: float) -> float:
        sign = 1.0 if sum(ds) >= 0 else -1.0
        agreeing = [(d, wi) for d, wi in zip(ds, w, strict=True) if d * sign > 0]
        return sum(d * wi for d, wi in agreeing) / max(sum(wi for _, wi in agreeing), 1e-6)

    return base + _each(one, *deltas).reshape(base.shape)


def breadcrumbs_mask(delta: Array, density: float, gamma: float) -> Array:
    """Largest first, ties to the lower index: the first int(gamma n) go, the next ones stay."""
    flat = np.abs(delta.reshape(-1))
    n = len(flat)
    stay = oracles._kept(density, n)
    top = min(oracles._kept(gamma, n), n - stay)
    order = sorted(range(n), key=lambda i: (-flat[i], i))
    mask = np.zeros(n, bool)
    mask[order[top : top + stay]] = True
    return mask.reshape(delta.shape)


def della_chances(delta: Array, density: float, epsilon: float) -> Array:
    rows = delta.reshape(-1, delta.shape[-1])
    out = np.empty(rows.shape)
    for row, chance in zip(rows, out, strict=True):
        ascending = sorted(range(len(row)), key=lambda i: (abs(row[i]), -i))
        for rank, place in enumerate(ascending):
            share = rank / (len(row) - 1) if len(row) > 1 else 0.5
            chance[place] = density - epsilon + 2 * epsilon * share
    return out.reshape(delta.shape)


def arcee_fusion(base: Array, other: Array) -> Array:
    rows = [x.reshape(-1, x.shape[-1]) for x in (base, other)]

    def softmax(x: Array) -> Array:
        grown = np.exp(x - x.max())
        return grown / grown.sum() + 1e-8

    importance = np.stack([
        np.abs(x - b) * float((softmax(x) * np.log(softmax(x) / softmax(b))).sum())
        for b, x in zip(*rows, strict=True)
    ])  # fmt: skip
    ordered = np.sort(importance.reshape(-1))
    q1, middle, q3 = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    chosen = importance >= middle + 1.5 * (q3 - q1)
    return np.where(chosen.reshape(base.shape), other, base)


def _each(one: Callable[..., float], *arrays: Array) -> Array:
    columns = zip(*(x.reshape(-1).tolist() for x in arrays), strict=True)
    return np.array([one(*column) for column in columns]).reshape(arrays[0].shape)
