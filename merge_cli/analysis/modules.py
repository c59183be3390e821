"""What kind of module a tensor belongs to, from its name, so that any architecture will do."""

from __future__ import annotations

import re
from functools import lru_cache

KINDS = (
    "embedding",
    "attention q",
    "attention k",
    "attention v",
    "attention qkv",
    "attention o",
    "mlp",
    "router",
    "norm",
    "head",
    "other",
)

_ATTENTION = r"(?:^|\.)\w*att(?:n|ention)\w*\."  # ...and what follows is inside of it
_START = r"(?:^|\.)"
# The first rule that matches the name without its `.weight` decides, so that
# `attention.output.LayerNorm` is a norm and `mlp.gate` a router.
_RULES = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        (
            "head",
            rf"{_START}(?:lm_head|embed_out|output|score|classifier|cls|qa_outputs)"
            r"(?:\.\D+)?$",
        ),
        ("norm", r"(?:norm|(?:^|[._])ln)[^.]*$"),
        ("router", r"(?:(?:moe|mlp|feed_forward)\.gate|router[^.]*(?:\.[^.]+)?)$"),
        ("embedding", rf"(?:embed|{_START}w[tp]e$|{_START}shared$|relative_attention_bias)"),
        (
            "attention qkv",
            r"(?:c_attn|query_key_value|wqkv|"
            rf"{_ATTENTION}(?:qkv|kv_|in_proj)[^.]*)$",
        ),
        ("attention q", rf"(?:q_proj|{_START}query|{_START}wq|q_[ab]_proj|q_lin|{_ATTENTION}q)$"),
        ("attention k", rf"(?:k_proj|{_START}key|{_START}wk|k_lin|{_ATTENTION}k)$"),
        ("attention v", rf"(?:v_proj|{_START}value|{_START}wv|v_lin|{_ATTENTION}v)$"),
        (
            "attention o",
            r"(?:o_proj|(?:^|\.)wo|out_lin|"
            + _ATTENTION
            + r"(?:out_proj|(?:output\.)?dense|c_proj|proj|to_out.*|o))$",
        ),
        (
            "mlp",
            r"(?:mlp|ffn|feed_?forward|experts?|DenseReluDense|fc_?\d|(?:up|down|gate)_proj|"
            r"c_fc|(?:intermediate|output)\.dense$|(?:^|\.)w[123]$|lin[12]$)",
        ),
    )
)


@lru_cache(maxsize=65_536)
def kind_of(name: str) -> str:
    """One of `KINDS`."""
    module = re.sub(r"\.(?:weight|bias)$|(?<=norm)_(?:weight|bias)$", "", name)
    in_layer = re.search(r"(?:^|\.)\d+\.", name) is not None
    for kind, pattern in _RULES:
        if pattern.search(module) and not (kind == "head" and in_layer):
            return kind
    return "other"
