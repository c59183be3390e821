"""Adapters of classifiers and reward models on a language model: another head, another class.

PEFT trains them on the language model's body under a new head (`score`), which the adapter brings.
The output is the classifier: the body, that head instead of the language model's, and a config that
names the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.header import TensorRef
from merge_cli.errors import Problem

TASK_HEADS = ("score", "classifier", "qa_outputs", "classification_head", "summary", "v_head")
_SUFFIXES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_WAY_OUT = (
    "Load the base as the class that was trained, add the adapter with PEFT, merge_and_unload, "
    "save_pretrained, and name the result."
)


@dataclass
class TaskHead:
    """What a head changes: tensors to add, keys of the config, and what is said of it."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def is_task_head(name: str) -> bool:
    """Whether a tensor is of a head that classifies, by its name."""
    parts = name.split(".")
    return len(parts) > 1 and any(part in TASK_HEADS for part in parts[:-1])


def put_head(
    brought: Mapping[str, TensorRef], config: Mapping[str, Any], task: Any, width: int, label: str
) -> TaskHead:
    """The head that an adapter brings to a language model.

    Args:
        brought: its tensors, which the model lacks.
        config: of the model.
        task: the adapter's task_type.
        width: of the model's embedding.
    """
    named = (config.get("architectures") or [""])[0]
    base = named if isinstance(named, str) else ""
    suffix = _SUFFIXES.get(task, "") if isinstance(task, str) else ""
    ending = next((one for one in _LANGUAGE if base.endswith(one)), "")
    target = base.removesuffix(ending) + suffix if suffix and ending else ""
    weight = brought.get("score.weight")
    extra = [name for name in brought if name not in ("score.weight", "score.bias")]
    fits = weight is not None and len(weight.shape) == 2 and weight.shape[1] == width
    found = TaskHead()
    if not target or weight is None or extra or not fits or not _exists(target):
        for name, ref in brought.items():
            what = (
                f"{label}: the adapter brings a head {list(ref.shape)} for {task or 'another task'}"
                f", which {base or 'the model'} lacks"
            )
            found.problems.append(Problem(what, name, hint=_WAY_OUT))
        return found
    found.tensors = dict(brought)
    found.changes = {"architectures": [target], **labels(config, weight.shape[0])}
    found.notes.append(
        f"the adapter brings a head (score, {weight.shape[0]} labels): the output is a {target}, "
        f"without the head of {base}"
    )
    if config.get("pad_token_id") is None:
        found.notes.append(
            "config.json has no pad_token_id, which classifiers need for batches "
            "of more than one row"
        )
    return found


def labels(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Keys of the config that say how many labels there are; empty where it says so already."""
    known = config.get("id2label")
    if (len(known) if isinstance(known, dict) else 2) == count:
        return {}
    names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _exists(name: str) -> bool:
    """Whether transformers has a class, looked up without loading any."""
    from transformers.models.auto import modeling_auto as auto

    known = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    )
    return any(name in mapping.values() for mapping in known)
