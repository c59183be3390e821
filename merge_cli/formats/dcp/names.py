"""Names of a training program, such as Megatron Core's, as those of Hugging Face.

`names.yaml` beside `.metadata` says for every tensor what it becomes:

    decoder.final_layernorm.weight: model.norm.weight
    decoder.layers.self_attention.linear_proj.weight: model.layers.{layer}.self_attn.o_proj.weight
    decoder.layers.mlp.linear_fc1.weight: [GATE, UP]            equal parts, along the rows
    decoder.layers.self_attention.linear_qkv.weight: {qkv: [Q, K, V]}
    embedding.word_embeddings.weight: {vocabulary: model.embed_tokens.weight}
    some.buffer: null                                          left out

Where the new name has `{layer}` and the old one has not, the first dimension counts layers.
`qkv` is Megatron's order: for each group of heads its queries, then its keys, then its values.
`vocabulary` cuts rows that were added to make the number of tokens even. Numbers of heads and of
tokens are those of config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.permuted_rows import PermutedRows, SourceRows
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import SourceError
from merge_cli.formats.dcp.files import NAMES
from merge_cli.formats.dcp.model import ShardedTensor
from merge_cli.system.untrusted import Unreadable

MEGATRON = "decoder.layers."  # what its names begin with
_LAYER = "{layer}"
_MAX_LAYERS = 100_000
_SHOWN = 3


@dataclass(frozen=True)
class Rule:
    """What a tensor becomes.

    Attributes:
        kind: `parts`, `qkv`, `vocabulary`; `nothing` for what is left out.
        targets: the new names.
    """

    old: str
    kind: str
    targets: tuple[str, ...]

    def match(self, name: str) -> dict[str, str] | None:
        """The layer that a name has, if the rule is about it; None if it is not."""
        pattern = re.escape(self.old).replace(re.escape(_LAYER), r"(?P<layer>\d{1,6})")
        result = re.fullmatch(pattern, name)
        return result.groupdict() if result else None


def parse_rules(document: Any) -> list[Rule]:
    """Read what `names.yaml` says.

    Args:
        document: its YAML, whose scalars are all text.

    Raises:
        Unreadable: it is no list of names; says which entry.
    """
    if not isinstance(document, dict) or not document:
        raise Unreadable("must say for each tensor what it becomes: OLD: NEW")
    return [_rule(old, new) for old, new in document.items()]


def _rule(old: Any, new: Any) -> Rule:
    if not isinstance(old, str) or old.count(_LAYER) > 1:
        raise Unreadable(f"{str(old)[:100]}: must be a name, with {_LAYER} once at most")
    kind, targets = "parts", new
    if isinstance(new, dict):
        if len(new) != 1 or next(iter(new)) not in ("qkv", "vocabulary"):
            raise Unreadable(f"{old}: knows qkv and vocabulary, one of them")
        [(kind, targets)] = new.items()
    if targets in ("", "null"):
        return Rule(old, "nothing", ())
    names = tuple(targets) if isinstance(targets, list) else (targets,)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise Unreadable(f"{old}: must become a name, or a list of names")
    if len({name.count(_LAYER) for name in names}) > 1 or names[0].count(_LAYER) > 1:
        raise Unreadable(f"{old}: {_LAYER} is in all of its new names once, or in none")
    if _LAYER in old and _LAYER not in names[0]:
        raise Unreadable(f"{old}: its new names have no {_LAYER}, so that layers would be one")
    wrong = {"qkv": 3, "vocabulary": 1}.get(kind, len(names)) != len(names)
    if wrong:
        raise Unreadable(f"{old}: qkv becomes three names, vocabulary one")
    return Rule(old, kind, names)


def renamed(
    tensors: Mapping[str, Tensor], rules: list[Rule], config: Mapping[str, Any], label: str
) -> dict[str, Tensor]:
    """The tensors with their new names.

    Args:
        config: of the model that they are.

    Raises:
        SourceError: a tensor of which nothing is said, or that cannot be cut as is said.
    """
    result: dict[str, Tensor] = {}
    unknown = []
    for old, tensor in tensors.items():
        matches = ((rule, rule.match(old)) for rule in rules)
        rule, match = next(((r, m) for r, m in matches if m is not None), (None, None))
        if rule is None or match is None:
            unknown.append(old)
            continue
        try:
            for name, made in _made(tensor, rule, match.get("layer"), text_config(config)):
                if name in result:
                    raise Unreadable(f"two tensors become {name}")
                result[name] = made
        except Unreadable as error:
            message = f"{NAMES} does not fit: {error}"
            raise SourceError(message, model=label, tensor=old) from None
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        message = f"{NAMES} does not say what {', '.join(unknown[:_SHOWN])}{more} become"
        raise SourceError(message, model=label, hint="Add them; `null` leaves one out.")
    return result


def _made(
    tensor: Tensor, rule: Rule, layer: str | None, config: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    if rule.kind == "nothing":
        return
    if _LAYER in rule.targets[0] and layer is None:
        count = tensor.shape[0] if len(tensor.shape) > 1 else 0
        if not 0 < count <= _MAX_LAYERS:
            raise Unreadable(f"its shape {list(tensor.shape)} has no dimension of layers")
        for number in range(count):
            expert = _without_first(_rows(tensor, number, number + 1))
            yield from _made(expert, rule, str(number), config)
        return
    targets = [name.replace(_LAYER, layer or "") for name in rule.targets]
    if rule.kind == "qkv":
        for name, rows in zip(targets, _qkv_rows(tensor.shape[0], config), strict=True):
            yield name, _chosen(_named(tensor, name), rows)
    elif rule.kind == "vocabulary":
        tokens = _number(config, "vocab_size")
        if tokens > tensor.shape[0]:
            raise Unreadable(f"{tensor.shape[0]} rows for {tokens} tokens")
        yield targets[0], _named(_rows(tensor, 0, tokens), targets[0])
    else:
        rows, rest = divmod(tensor.shape[0], len(targets))
        if rest:
            raise Unreadable(f"{tensor.shape[0]} rows are not {len(targets)} equal parts")
        for number, name in enumerate(targets):
            yield name, _named(_rows(tensor, number * rows, (number + 1) * rows), name)


def _qkv_rows(rows: int, config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Which rows are queries, keys and values: int64 each, in the order of heads."""
    import numpy as np

    heads = _number(config, "num_attention_heads")
    groups = _number(config, "num_key_value_heads", heads)
    if heads % groups or rows % (heads + 2 * groups):
        raise Unreadable(f"{rows} rows are not those of {heads} heads in {groups} groups")
    head, queries = rows // (heads + 2 * groups), heads // groups
    grid = np.arange(rows, dtype=np.int64).reshape(groups, queries + 2, head)
    query, key, value = grid[:, :queries], grid[:, queries], grid[:, queries + 1]
    return query.reshape(-1), key.reshape(-1), value.reshape(-1)


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise Unreadable(f"{key} is needed from config.json beside it")
    return value


def _chosen(tensor: Tensor, rows: Any) -> Tensor:
    import numpy as np

    return PermutedRows(tensor, (tensor,), SourceRows(np.zeros(len(rows), np.int32), rows, {}))


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop): of the parts that have some, those bytes alone."""
    if isinstance(tensor, TensorRef):
        return _rows_of_part(tensor, start, stop)
    assert isinstance(tensor, ShardedTensor)
    parts = []
    for offsets, part in tensor.parts:
        low, high = max(start, offsets[0]), min(stop, offsets[0] + part.shape[0])
        if low < high:
            kept = _rows_of_part(part, low - offsets[0], high - offsets[0])
            parts.append(((low - start, *offsets[1:]), kept))
    return ShardedTensor(tensor.name, (stop - start, *tensor.shape[1:]), parts)


def _rows_of_part(part: TensorRef, start: int, stop: int) -> TensorRef:
    row = part.size // part.shape[0] * width_of(part.dtype)
    shape = (stop - start, *part.shape[1:])
    return part._replace(shape=shape, offset=part.offset + start * row, nbytes=(stop - start) * row)


def _without_first(tensor: Tensor) -> Tensor:
    """A tensor whose first dimension is one, without it."""
    if isinstance(tensor, TensorRef):
        return tensor._replace(shape=tensor.shape[1:])
    assert isinstance(tensor, ShardedTensor)
    parts = [(offsets[1:], part._replace(shape=part.shape[1:])) for offsets, part in tensor.parts]
    return ShardedTensor(tensor.name, tensor.shape[1:], parts)


def _named(tensor: Tensor, name: str) -> Tensor:
    if isinstance(tensor, TensorRef):
        return tensor._replace(name=name)
    assert isinstance(tensor, ShardedTensor)
    return replace(tensor, name=name)
