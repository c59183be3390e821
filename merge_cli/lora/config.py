"""adapter_config.json: the fields that are understood, and the values that each may have.

A field can change what an adapter's factors mean, or which base they belong to. So any field or
value that is not listed here is refused by its name, unless it is empty. The list covers PEFT's
LoraConfig, 0.1 to 0.21, and fields that other tools add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_cli.errors import MismatchError, Problem, SourceError
from merge_cli.system.patterns import compile_pattern
from merge_cli.system.untrusted import Unreadable, kind_of, read_mapping

CONFIG = "adapter_config.json"
_MAX_RANK = 2**20
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8  # PEFT's default

_WITH_PEFT = "Merge it into its base with PEFT (`merge_and_unload`), and name the result."
_CONVERT = (
    "Save it as plain LoRA: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`; "
    "or merge it into its base with PEFT (`merge_and_unload`), and name the result."
)
# Initialisations that leave the base as it is. Others take a part out of its weights first.
_HARMLESS_INIT = frozenset(("gaussian", "eva", "orthogonal", "mica", "default", "kaiming"))
_PREPARES_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
# Fields about training, running, or paths: no number of the merged model depends on them.
_INERT = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        # How factors began, or how gradients were computed; PEFT ignores the first ones unless
        # `init_lora_weights` asks for them.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "velora_config",
        # ms-swift's.
        "lora_dtype",
        "lorap_emb_lr",
        "lorap_lr_ratio",
    )
)
# Fields that are understood well enough to know that they cannot be merged here.
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA): it acts on the tokens after its "
    "invocation alone, and no merged weight does that",
    "arrow_config": "a router over several adapters (Arrow), which no single weight can be",
    "enable_lora": "LoRA on parts of a fused matrix (enable_lora)",
    "kasa_config": "KaSA: it takes a part out of its base's weights",
    "layer_replication": "layers that it repeats (layer_replication)",
    "megatron_config": "layers of Megatron (megatron_config), which are stored in parts",
    "monteclora_config": "MonteCLoRA: its weights are drawn anew",
    "trainable_token_indices": "trained rows of single tokens (trainable_token_indices)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
    "use_qalora": "QALoRA: its factors are of grouped inputs",
}
Complaints = Iterator[tuple[str, str]]


def read_config(path: Path, label: str) -> dict[str, Any]:
    """Read an adapter's config and check that every field is understood.

    Raises:
        CorruptFileError: not a mapping, or not readable.
        SourceError, MismatchError: all fields or values that are not supported.
    """
    config = read_mapping(path, label)
    problems = list(_problems(config))
    if not problems:
        return config
    if len(problems) == 1:
        raise SourceError(problems[0].message, model=label, file=CONFIG, hint=problems[0].hint)
    raise MismatchError(problems, f"{label}: {CONFIG} asks for what is not supported")


def _problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        kind_name = kind if isinstance(kind, str) else kind_of(kind)
        message = f"its adapter is of the kind {kind_name[:40]}; only LoRA is supported"
        yield Problem(message, "peft_type", hint=_WITH_PEFT)
        return
    for key, value in config.items():
        if key in _REFUSED:
            if not _is_empty(value):
                message = f"the adapter has {_REFUSED[key]}"
                message += "" if key in message else f" ({key})"
                yield Problem(message, key, hint=_hint(key))
        elif key in _CHECKED:
            for message, hint in _CHECKED[key](value):
                yield Problem(f"{key} {message}", key, hint=hint)
        elif key not in _INERT and not _is_empty(value):
            message = f"{key[:80]!r} is an unknown field (it is {kind_of(value)})"
            hint = f"Its meaning could change the weights. {_WITH_PEFT}"
            yield Problem(message, key, hint=hint)
    layers = config.get("layers_to_transform")
    if isinstance(config.get("target_modules"), str) and layers not in (None, []):
        yield Problem(
            "layers_to_transform has no meaning where target_modules is an expression",
            "layers_to_transform",
            hint="Write the modules' names out.",
        )
    if config.get("lora_bias") and config.get("use_dora"):
        yield Problem(
            "DoRA with biases (lora_bias) is not supported",
            "lora_bias",
            hint=_WITH_PEFT,
        )


def _hint(key: str) -> str:
    if key == "alora_invocation_tokens":
        return "Load it with PEFT onto the base."
    return _WITH_PEFT


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _init(value: Any) -> Complaints:
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    prepared = next((full for short, full in _PREPARES_BASE.items() if name.startswith(short)), "")
    if prepared:
        message = (
            f"is {value[:40]!r}: {prepared} prepares the base, and the factors are of that one"
        )
        yield message, _CONVERT
    elif name not in _HARMLESS_INIT:
        yield f"is {kind_of(value)}, an unknown initialisation", _CONVERT


def _flag(value: Any) -> Complaints:
    if value is not None and not isinstance(value, bool):
        yield f"must be true or false (it is {kind_of(value)})", ""


def _rank(value: Any) -> Complaints:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        yield f"must be a whole number from 1 to {_MAX_RANK} (it is {kind_of(value)})", ""


def _alpha(value: Any) -> Complaints:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        yield f"must be a number (it is {kind_of(value)})", ""


def _bias(value: Any) -> Complaints:
    if value not in (None, "none", "all", "lora_only"):
        yield f"must be none, all or lora_only (it is {kind_of(value)})", ""


def _task(value: Any) -> Complaints:
    if value is not None and not isinstance(value, str):
        yield f"must be a word such as CAUSAL_LM (it is {kind_of(value)})", ""


def _names(value: Any) -> Complaints:
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        yield f"must be a list of names (it is {kind_of(value)})", ""


def _modules(value: Any) -> Complaints:
    """Names of modules, or one expression for them."""
    if not isinstance(value, str):
        yield from _names(value)
    elif why := _why_unfit(value):
        yield why, "Write the modules' names out."


def _saved(value: Any) -> Complaints:
    yield from _names(value)
    for name in value if isinstance(value, list) else ():
        if isinstance(name, str) and (not name or (why := _why_unfit(name))):
            yield f"has the name {name[:80]!r}, which {why if name else 'is empty'}", ""


def _layers(value: Any) -> Complaints:
    numbers = value if isinstance(value, list) else [value]
    if value is not None and not all(type(number) is int for number in numbers):
        yield f"must be numbers of layers (it is {kind_of(value)})", ""


def _layer_lists(value: Any) -> Complaints:
    """Names of lists of layers, each an expression."""
    names = [value] if isinstance(value, str) else value
    yield from _names(names)
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and (why := _why_unfit(name)):
            yield f"has the name {name[:80]!r}, which {why}", ""


def _patterns(of: Callable[[Any], Complaints]) -> Callable[[Any], Complaints]:
    def check(value: Any) -> Complaints:
        if _is_empty(value):
            return
        if not isinstance(value, dict):
            yield f"must map names to numbers (it is {kind_of(value)})", ""
            return
        for pattern, number in value.items():
            yield from ((f"of {pattern[:80]!r} {message}", hint) for message, hint in of(number))
            why = _why_unfit(pattern)
            if why:
                yield f"has the name {pattern[:80]!r}, which {why}", "Write the modules' names out."

    return check


_CHECKED: dict[str, Callable[[Any], Complaints]] = {
    "alpha_pattern": _patterns(_alpha),
    "bias": _bias,
    "ensure_weight_tying": _flag,
    "exclude_modules": _modules,
    "fan_in_fan_out": _flag,
    "init_lora_weights": _init,
    "layers_pattern": _layer_lists,
    "layers_to_transform": _layers,
    "lora_alpha": _alpha,
    "lora_bias": _flag,
    "modules_to_save": _saved,
    "peft_type": lambda value: iter(()),
    "r": _rank,
    "rank_pattern": _patterns(_rank),
    "target_modules": _modules,
    "target_parameters": _names,
    "task_type": _task,
    "use_dora": _flag,
    "use_rslora": _flag,
}


def by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """The value for a module.

    PEFT's rule: a key is a regular expression for the end of the name, and the first one counts.

    Raises:
        SourceError: an expression that takes too long.
    """
    for pattern, value in (patterns or {}).items():
        try:
            if name == pattern or name.endswith(f".{pattern}") or _matcher(pattern)(name):
                return value
        except Unreadable as error:
            hint = "Write the modules' names out."
            raise SourceError(f"{pattern[:80]!r} {error}", file=CONFIG, hint=hint) from None
    return default


def configured_rank(config: Mapping[str, Any], name: str) -> Any:
    """The rank that a module's factors must have: PEFT's own where the config gives none."""
    return by_pattern(config.get("rank_pattern"), name, config.get("r", _DEFAULT_RANK))


def scale_of(config: Mapping[str, Any], key: str, rank: int) -> float:
    """What the product of a module's factors is multiplied with: alpha / r, or alpha / sqrt(r)."""
    default = config.get("lora_alpha", _DEFAULT_ALPHA)
    alpha = float(by_pattern(config.get("alpha_pattern"), key, default))
    return float(alpha / rank**0.5) if config.get("use_rslora") else alpha / rank


def _matcher(pattern: str) -> Callable[[str], Any]:
    return compile_pattern(rf"(.*\.)?({pattern})$").match


def _why_unfit(pattern: str) -> str:
    """Why a pattern cannot be matched; empty when it can."""
    try:
        _matcher(pattern)
    except Unreadable as error:
        return str(error)
    return ""
