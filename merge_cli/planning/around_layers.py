"""What stands before a stack of layers and what stands after it, read from tensors' names.

What is before the layers (embeddings, norms and projections of inputs) comes from the first slice,
and takes its parameters; what is after them (final norm, head, pooler, classifier) from the last.
Names say it by their words, split at capitals, digits, `_` and `.`. The words were read off 420
classes of transformers, beside the order in which these make their modules. What no word says
belongs to another module (a vision tower, a projector) and comes from the first slice.
"""

from __future__ import annotations

import re
from functools import lru_cache

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
# These decide alone (`embed_out`, `emb_layer_norm_after`, `pre_classifier`) ...
_AFTER = frozenset(
    (
        "after",
        "classification",
        "classifier",
        "cls",
        "final",
        "head",
        "last",
        "logit",
        "logits",
        "loss",
        "out",
        "output",
        "outputs",
        "pooler",
        "pred",
        "predictions",
        "qa",
        "score",
        "scores",
        "summary",
        "unembed",
        "unembedding",
    )
)
# ... these where none of those is there (`word_embeddings_layernorm`, `pre_layrnorm`) ...
_BEFORE = frozenset(
    (
        "before",
        "conv",
        "emb",
        "embd",
        "embed",
        "embedder",
        "embedding",
        "embeddings",
        "embeds",
        "in",
        "input",
        "inputs",
        "patch",
        "per",
        "pos",
        "position",
        "positional",
        "positions",
        "pre",
        "rel",
        "relative",
        "rotary",
        "shared",
        "stem",
        "token",
        "tokens",
        "type",
        "word",
        "words",
        "wpe",
        "wte",
    )
)
# ... and these where neither is.
_LASTLY_AFTER = frozenset(
    ("layernorm", "layrnorm", "ln", "lnf", "norm", "normalization", "post", "rmsnorm", "vocab")
)
# LFM2's final norm; inputs that a head reads; heads that are one linear layer.
_NAMED_AFTER = ("embedding_norm",)
_NAMED_BEFORE = ("cls_token",)
_BARE_HEAD = re.compile(r"(decoder|dense)\.(weight|bias)")


def comes_after_layers(name: str, stack: str) -> bool:
    """Whether a tensor without a layer belongs behind a stack (final norm, lm_head).

    It must stand beside the stack or beside one of its parents: the norm of a projector or of
    another module belongs to that module.
    """
    parents = stack.split(".")[:-1]
    for depth in range(len(parents), -1, -1):
        parent = "".join(f"{part}." for part in parents[:depth])
        if not name.startswith(parent):
            continue
        module = name[len(parent) :].partition(".")[0]
        if depth == 0 and module not in stack.split(".") and _BARE_HEAD.fullmatch(name):
            return True
        if _is_after(module):
            return True
    return False


@lru_cache(maxsize=4096)
def _is_after(module: str) -> bool:
    """Whether a module that stands beside layers comes after them."""
    if module in _NAMED_AFTER or module in _NAMED_BEFORE:
        return module in _NAMED_AFTER
    words = frozenset(word.lower() for word in _WORD.findall(module))
    if words & _AFTER:
        return True
    return not words & _BEFORE and bool(words & _LASTLY_AFTER)
