"""The keys of a recipe that do nothing or are not supported, and the nearest of some names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Seen in recipes in the wild and without effect in mergekit 0.1.5: one line, not an error.
INEFFECTIVE = {
    "embed_slerp": "mergekit ignores it, too: embeddings are merged like any other tensor",
    "input_model_parameters": "mergekit ignores it, too",
    "residual_weight": "mergekit ignores it, too",
    "override_architecture": "tensors are matched by name, whatever the architecture",
    "int8_mask": "not needed here: masks are never stored",
}
# Of mergekit's, where they do nothing: key -> why.
UNUSED_LAYER_RANGE = "whole models are merged here; layers are chosen under `slices`"
UNUSED_SEED = "`seed` says it"
# The parameters of all of mergekit's methods. It reads those that the method has, where the method
# has them, and passes by the others: so recipes that are copied from one another are full of them.
MERGEKIT_PARAMETERS = frozenset(
    {
        "weight",
        "density",
        "normalize",
        "rescale",
        "lambda",
        "int8_mask",
        "gamma",
        "epsilon",
        "t",
        "scale",
        "select_topk",
        "filter_wise",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "normalize_weights",
        "eps",
        "max_iter",
        "tol",
        "r",
        "alpha",
    }
)
# Known to mergekit or to the field: a recipe that needs them must not run without.
UNSUPPORTED = {
    "genome": "a file of mergekit-evolve; the same search is `merge_method: evolutionary` with "
    "`search` and `objective` here (docs/evolve.md)",
    "experts": "a file of mergekit-moe; mixtures of experts are not made by this version",
    "layer_slices": "a file of bakllama; the same model is `slices` with `passthrough`",
    "data": "`data` belongs to a model: write it under each of `models`",
}
SOURCE_KEYS = ("models", "slices", "modules", "checkpoints")  # one of them lists what is merged

DTYPES = ("float32", "float16", "bfloat16", "float64")
# Of `out_dtype`: matrices of layers as codes of few bits with scales, the rest not. Formats say
# what each means (`formats.storage_format.WritableFormat`).
FP8, SAME = "fp8", "same"
CODES = (FP8, "fp8_row", "fp8_tensor", "int4", "nvfp4", "mxfp4", SAME)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`Did you mean 'x'?`, or the list of what is known when nothing is near."""
    names = sorted(candidates)
    lower = word.lower()
    match = [name for name in names if name.lower() == lower]
    match = match or difflib.get_close_matches(lower, names, n=1, cutoff=0.6)
    match = match or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean '{match[0]}'?" if match else f"Known: {', '.join(names)}."
