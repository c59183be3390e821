"""The same weights in another layout: experts one by one or stacked, and names that have changed.

transformers 5 keeps the experts of a layer in two stacked tensors, `experts.gate_up_proj` (experts,
gate above up, inputs) and `experts.down_proj`; files have them so, or one by one as transformers 4
saved them. Every source takes the layout of the reference while it is read, in either direction.
Old names (`LayerNorm.gamma`, `weight_g`, `block_sparse_moe`) become the reference's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merge_cli.checkpoint.tensor_parts import JoinedTensor, cut
from merge_cli.checkpoint.tensors import Tensor, has_names
from merge_cli.planning.layers import layer_key_of
from merge_cli.sources.source import Source

_SPLIT = re.compile(r"(?P<module>.*\.experts)\.(?P<number>\d{1,6})\.(?P<role>\w+)\.weight")
_STACKED = re.compile(r"(?P<module>.*\.experts)\.(?P<role>gate_up_proj|up_proj|down_proj)")
# What Mixtral and its kin call them, and what the others do.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ROLES = {name: role for names in _NAMES for name, role in zip(names, _NAMES[0], strict=True)}
# Their stacks are stored [experts, inputs, outputs], which joining does not make.
_TURNED = ("llama4", "llama4_text", "gpt_oss", "qwen3_vl_moe", "qwen3_vl_moe_text", "dbrx")
# Parts of names, old and new.
_RENAMED = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
    (".block_sparse_moe.", ".mlp."),
    (".mlp.gate.weight", ".mlp.router.weight"),
    (".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
    (".mlp.moe_statics.", ".mlp.gate.moe_statics."),
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
)
_STEPS = 3  # of renaming: block_sparse_moe.gate -> mlp.gate -> mlp.router


@dataclass(frozen=True)
class RelaidModel:
    """Sources in the reference's layout, and what was done."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()


def lay_out_alike(sources: Sequence[Source], reference: int) -> RelaidModel:
    """Bring every source into the layout of the reference."""
    reference_source = sources[reference]
    relaid, labels_by_line = list(sources), dict[str, list[str]]()
    keys: frozenset[str] = frozenset()
    for i, source in enumerate(sources):
        if (
            has_names(reference_source.tensors, source.tensors)
            or reference_source.config.get("model_type") in _TURNED
        ):
            continue
        keys = keys or frozenset(map(_key, reference_source.tensors))
        tensors, lines = _converted(source.tensors, keys)
        if lines:
            relaid[i] = replace(source, tensors=tensors)
            for line in lines:
                labels_by_line.setdefault(line, []).append(source.label)
    notes = (
        f"{', '.join(who)}: {line.format(reference_source.label)}"
        for line, who in labels_by_line.items()
    )
    return RelaidModel(tuple(relaid), tuple(notes))


def _key(name: str) -> str:
    """What is looked for in the reference: a name without its layer, and what stands before it."""
    key = layer_key_of(name)
    return key.rest if key else ".".join(name.split(".")[-3:])


def _converted(
    tensors: Mapping[str, Tensor], keys: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under names, and in a layout, that the reference has; a line for each kind."""
    made: dict[str, Tensor] = {}  # in the place of the ones that are taken away
    taken: set[str] = set()
    lines: dict[str, None] = {}
    for module, experts in _modules(tensors).items():
        stacked = _stack(module, experts, keys)
        if stacked:
            made |= stacked
            taken |= {_of(module, n, name) for n, refs in experts.items() for name in refs}
            lines["experts are stored one by one; stacked while they are read, as in {}"] = None
    for name, tensor in tensors.items():
        parts = _cut_up(name, tensor, keys)
        if parts:
            made |= parts
            taken.add(name)
            lines[
                "experts are stored in stacks; taken one by one while they are read, as in {}"
            ] = None
    rules: dict[str, None] = {}
    unchanged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in taken:
            continue
        new = None if _key(name) in keys else _renamed(name, keys)
        if new and new[0] not in tensors and new[0] not in unchanged:
            rules |= dict.fromkeys(new[1])
            name = new[0]
        unchanged[name] = tensor
    if rules:
        lines[f"other names of the same tensors: {', '.join(rules)}, as in {{}}"] = None
    return {**unchanged, **made}, list(lines)


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, dict[str, Tensor]]]:
    """Experts that are stored one by one: module -> number -> name there -> tensor."""
    result: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _SPLIT.fullmatch(name)
        if match and match["role"] in _ROLES:
            experts = result.setdefault(match["module"], {})
            experts.setdefault(int(match["number"]), {})[match["role"]] = tensor
    return result


def _of(module: str, number: int, name: str) -> str:
    return f"{module}.{number}.{name}.weight"


def _stack(
    module: str, experts: Mapping[int, Mapping[str, Tensor]], keys: Collection[str]
) -> dict[str, Tensor]:
    """The stacks of a layer's experts; empty where the reference has none, or they do not fit."""
    order = range(len(experts))
    if not all(number in experts for number in order):
        return {}
    first = experts[0]
    if any(expert.keys() != first.keys() for expert in experts.values()):
        return {}
    if len({tuple(expert[name].shape for name in first) for expert in experts.values()}) > 1:
        return {}
    roles = {_ROLES[name]: name for name in first}
    if len(roles) < len(first) or any(len(item.shape) != 2 for item in first.values()):
        return {}
    gated = "gate_proj" in roles
    if gated and (
        "up_proj" not in roles or first[roles["gate_proj"]].shape != first[roles["up_proj"]].shape
    ):
        return {}
    made: dict[str, Tensor] = {}
    requested = (
        [("gate_up_proj", ("gate_proj", "up_proj"))] if gated else [("up_proj", ("up_proj",))]
    )
    for name, of in [*requested, ("down_proj", ("down_proj",))]:
        target = next((new for new in _variants(f"{module}.{name}") if _key(new) in keys), None)
        if target is None or any(role not in roles for role in of):
            return {}
        parts = [experts[number][roles[role]] for number in order for role in of]
        rows, columns = parts[0].shape
        made[target] = JoinedTensor(target, (len(order), len(of) * rows, columns), parts)
    return made


def _cut_up(name: str, tensor: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
    """The experts of a stack; empty where the reference has none of them by itself."""
    match = _STACKED.fullmatch(name)
    if match is None or len(tensor.shape) != 3 or _key(name) in keys:
        return {}
    roles = ("gate_proj", "up_proj") if match["role"] == "gate_up_proj" else (match["role"],)
    experts, rows, columns = tensor.shape
    if rows % len(roles):
        return {}
    rows //= len(roles)
    for module in _variants(f"{match['module']}."):
        for names in _NAMES:
            called = [names[_NAMES[0].index(role)] for role in roles]
            if all(_key(f"{module}0.{role_name}.weight") in keys for role_name in called):
                targets = [f"{module}{n}.{item}.weight" for n in range(experts) for item in called]
                return {
                    target: cut(tensor, target, i * rows * columns, (rows, columns))
                    for i, target in enumerate(targets)
                }
    return {}


def _renamed(name: str, keys: Collection[str]) -> tuple[str, list[str]] | None:
    """The name that the reference would have for it, and the rules that lead there."""
    ways = _variants(name)
    return next(((new, ways[new]) for new in ways if _key(new) in keys), None)


def _variants(name: str) -> dict[str, list[str]]:
    """A name and all that it may be called instead, with the rules that lead there."""
    result: dict[str, list[str]] = {name: []}
    latest = [name]
    for _ in range(_STEPS):
        steps = [(spelling, new, rule) for spelling in latest for new, rule in _steps(spelling)]
        latest = []
        for item, new, rule in steps:
            if new not in result:
                result[new] = [*result[item], rule]
                latest.append(new)
    return result


def _steps(name: str) -> Iterator[tuple[str, str]]:
    for pair in _RENAMED:
        for old, new in (pair, pair[::-1]):
            if old in name:
                yield name.replace(old, new, 1), f"{old.strip('.')} -> {new.strip('.')}"
