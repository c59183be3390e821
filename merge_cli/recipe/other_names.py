"""Names that a tensor goes by where its file has another: filters look at all of them.

transformers 5, and mergekit with it, joins the experts of a layer to `mlp.experts.gate_up_proj` and
`mlp.experts.down_proj`, and knows no `block_sparse_moe`, which files of Mixtral and its kin still
have. So `filter: mlp` means their experts and routers, too.
"""

from __future__ import annotations

import re
from functools import lru_cache

_OLD_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.[0-9]+\.(?P<role>\w+)\.(?:weight|bias)")
_JOINED = {
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w2": "down_proj",
    "down_proj": "down_proj",
}


@lru_cache(maxsize=8192)
def other_names(name: str) -> tuple[str, ...]:
    """What else the tensor of a file is called: in a newer file, and in memory."""
    names = dict.fromkeys((name, name.replace(_OLD_BLOCK, _BLOCK)))
    for full in tuple(names):
        match = _EXPERT.fullmatch(full)
        if match and match["role"] in _JOINED:
            names[f"{match['experts']}.{_JOINED[match['role']]}"] = None
    return tuple(names)[1:]
