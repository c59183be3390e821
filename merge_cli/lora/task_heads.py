"""Heads of classifiers and reward models, which an adapter brings to a language model.

The adapter has a new head (`score`) on the language model's body. The output is the classifier: the
body, that head instead of the language model's, and a config that names the class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.errors import Problem
from merge_cli.lora.heads import GENERATIVE, HeadChange

TASK_HEADS = ("score", "classifier", "qa_outputs", "classification_head", "summary", "v_head")
_SUFFIXES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
_MERGE_WITH_PEFT = (
    "Load the base as the class that was trained, add the adapter with PEFT, merge_and_unload, "
    "save_pretrained, and name the result."
)


def first_task_head(names: Iterable[str]) -> str:
    """The first name of a classifier's head; empty where none is."""
    listed = list(names)
    text = "\n.".join(["", *listed])
    if not any(f".{head}." in text for head in TASK_HEADS):  # as a rule: no name is taken apart
        return ""
    return next(filter(is_task_head, listed), "")


def is_task_head(name: str) -> bool:
    """Whether a tensor's name is that of a classifier's head."""
    parts = name.split(".")
    return len(parts) > 1 and any(part in TASK_HEADS for part in parts[:-1])


def add_task_head(
    replacements: Mapping[str, TensorRef],
    config: Mapping[str, Any],
    task: Any,
    width: int,
    label: str,
) -> HeadChange:
    """The head that an adapter brings to a language model.

    Args:
        replacements: its tensors, which the model lacks.
        config: of the model.
        task: the adapter's task_type.
        width: of the model's embedding.
    """
    architecture = (config.get("architectures") or [""])[0]
    base = architecture if isinstance(architecture, str) else ""
    suffix = _SUFFIXES.get(task, "") if isinstance(task, str) else ""
    ending = next((e for e in GENERATIVE if base.endswith(e)), "")
    target = base.removesuffix(ending) + suffix if suffix and ending else ""
    weight = replacements.get("score.weight")
    extra = [name for name in replacements if name not in ("score.weight", "score.bias")]
    fits = weight is not None and len(weight.shape) == 2 and weight.shape[1] == width
    change = HeadChange()
    if not target or weight is None or extra or not fits or not _exists(target):
        for name, ref in replacements.items():
            message = (
                f"{label}: the adapter brings a head {list(ref.shape)} for {task or 'another task'}"
                f", which {base or 'the model'} lacks"
            )
            change.problems.append(Problem(message, name, hint=_MERGE_WITH_PEFT))
        return change
    change.tensors = {name: ref._replace(name=name) for name, ref in replacements.items()}
    change.changes = {"architectures": [target], **labels(config, weight.shape[0])}
    change.notes.append(
        f"the adapter brings a head (score, {weight.shape[0]} labels): the output is a {target}, "
        f"without the head of {base}"
    )
    if config.get("pad_token_id") is None:
        change.notes.append(
            "config.json has no pad_token_id, which classifiers need for batches "
            "of more than one row"
        )
    return change


def labels(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Keys of the config for this number of labels; empty where the config has that number."""
    existing = config.get("id2label")
    if (len(existing) if isinstance(existing, dict) else 2) == count:
        return {}
    names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _exists(name: str) -> bool:
    """Whether transformers has a class, looked up without loading any."""
    from transformers.models.auto import modeling_auto as auto

    mappings = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    )
    return any(name in mapping.values() for mapping in mappings)
