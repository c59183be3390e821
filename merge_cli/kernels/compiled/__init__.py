"""The primitives as compiled loops over float32 arrays, for CPUs.

Every function here has a plain twin in the module that calls it, and the tests compare the two bit
for bit. Nothing may be reordered or contracted: `fastmath` stays off, except in `measures`.

Loops come in two shapes, and both must vectorise: over a whole block where one pass is enough, and
over chunks that stay in the L1 cache where several passes follow one another. Indexes into slices
start at 0, or the compiler looks out for negative ones.
"""

from merge_cli.kernels.compiled.blocks import (
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
)
from merge_cli.kernels.compiled.codes import look_up, scale_groups, spread_bytes
from merge_cli.kernels.compiled.election import disjoint_mean
from merge_cli.kernels.compiled.encoders import (
    block_largest,
    encode_affine,
    encode_e2m1,
    encode_e4m3,
    encode_e5m2,
    encode_int4,
    group_extremes,
)
from merge_cli.kernels.compiled.formats import (
    decode_bf16,
    decode_f16,
    encode_bf16,
    encode_f16,
    non_finite,
)
from merge_cli.kernels.compiled.fused import NOT_FINITE, TOO_LARGE, merge_disjoint, merge_linear
from merge_cli.kernels.compiled.kernel import Kernel, available
from merge_cli.kernels.compiled.magnitudes import (
    count_kept,
    count_keys,
    count_range,
    find_tie,
    not_empty,
    trim,
)
from merge_cli.kernels.compiled.masks import count_masked, drop
from merge_cli.kernels.compiled.measures import count_signs, gram, quick_change
from merge_cli.kernels.compiled.passes import (
    count_stored,
    dot_stored,
    find_stored,
    keys_stored,
    measure_stored,
)
from merge_cli.kernels.compiled.pieces import read_pieces
from merge_cli.kernels.compiled.products import (
    combine_rows,
    gram_product,
    orthonormalise,
    project_rows,
)
from merge_cli.kernels.compiled.ranks import kth_largest, rank_stored
from merge_cli.kernels.compiled.relations import count_relations, read_sample, relate_streams
from merge_cli.kernels.compiled.singular import eigenvalues, own_products, reflect, tridiagonal
from merge_cli.kernels.compiled.streams import (
    count_stream,
    dot_stream,
    find_stream,
    merge_streams,
    sample_stream,
)
from merge_cli.kernels.compiled.sums import (
    absolute_runs,
    add_scaled,
    dot_runs,
    low_rank_product,
    weighted_sum,
)
from merge_cli.kernels.compiled.tiles import BF16, COUNT, F16, FLOAT32, NOTHING, WEIGHTS
from merge_cli.kernels.compiled.turned import turned_eights, turned_fp4, turned_words

__all__ = [
    "BF16",
    "COUNT",
    "F16",
    "FLOAT32",
    "Kernel",
    "NOTHING",
    "NOT_FINITE",
    "TOO_LARGE",
    "WEIGHTS",
    "absolute_runs",
    "add_scaled",
    "available",
    "block_largest",
    "combine_rows",
    "count_kept",
    "count_keys",
    "count_masked",
    "count_range",
    "count_relations",
    "count_signs",
    "count_stored",
    "count_stream",
    "decode_bf16",
    "decode_f16",
    "disjoint_mean",
    "dot_runs",
    "dot_stored",
    "dot_stream",
    "drop",
    "eigenvalues",
    "encode_affine",
    "encode_bf16",
    "encode_e2m1",
    "encode_e4m3",
    "encode_e5m2",
    "encode_f16",
    "encode_int4",
    "find_stored",
    "find_stream",
    "find_tie",
    "gram",
    "gram_product",
    "group_extremes",
    "keys_stored",
    "kth_largest",
    "look_up",
    "low_rank_product",
    "measure_stored",
    "merge_disjoint",
    "merge_linear",
    "merge_streams",
    "non_finite",
    "not_empty",
    "orthonormalise",
    "own_products",
    "project_rows",
    "q2_k",
    "q3_k",
    "q4_0",
    "q4_1",
    "q4_k",
    "q5_0",
    "q5_1",
    "q5_k",
    "q6_k",
    "q8_0",
    "quick_change",
    "rank_stored",
    "read_pieces",
    "read_sample",
    "relate_streams",
    "sample_stream",
    "reflect",
    "scale_groups",
    "spread_bytes",
    "tridiagonal",
    "trim",
    "turned_eights",
    "turned_fp4",
    "turned_words",
    "weighted_sum",
]
