"""The primitives as compiled loops over float32 arrays, for CPUs.

Every function here has a plain twin in the module that calls it, and the tests compare the two bit
for bit. Nothing may be reordered or contracted: `fastmath` stays off, except in `measures`.

Loops come in two shapes, and both must vectorise: over a whole block where one pass is enough, and
over chunks that stay in the L1 cache where several passes follow one another. Indexes into slices
start at 0, or the compiler looks out for negative ones.

A module of loops is imported when one of them is asked for: a merge needs few of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Which module has which loops, and what else callers use.
_MODULES = {
    "blocks": "q2_k q3_k q4_0 q4_1 q4_k q5_0 q5_1 q5_k q6_k q8_0",
    "codes": "look_up scale_groups spread_bytes",
    "election": "disjoint_mean",
    "encoders": "block_largest encode_affine encode_e2m1 encode_e4m3 encode_e5m2 encode_int4 "
    "group_extremes",
    "formats": "decode_bf16 decode_f16 encode_bf16 encode_f16 non_finite",
    "fused": "NOT_FINITE TOO_LARGE merge_disjoint merge_linear",
    "kernel": "Kernel available",
    "magnitudes": "count_kept count_keys count_range distinct_keys find_tie not_empty trim",
    "masks": "count_masked drop",
    "measures": "count_signs gram quick_change",
    "passes": "count_stored dot_stored find_stored keys_stored measure_stored",
    "pieces": "read_pieces",
    "products": "combine_rows gram_product orthonormalise project_rows",
    "ranks": "kth_largest rank_stored",
    "relations": "count_relations read_sample relate_streams",
    "singular": "eigenvalues own_products reflect tridiagonal",
    "streams": "count_stream dot_stream find_stream merge_streams sample_stream",
    "sums": "absolute_runs add_low_rank add_scaled dot_runs weighted_sum",
    "tiles": "BF16 COUNT F16 FLOAT32 NOTHING WEIGHTS",
    "turned": "turned_eights turned_fp4 turned_words",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_HOMES)  # they are found by `__getattr__`


def __getattr__(name: str) -> Any:
    """A loop by its name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
