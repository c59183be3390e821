"""Input embedding and output head of a model with an adapter: tied, untied, and of one height.

A tied head is the embedding's own weight. PEFT copies what it trains: an adapter of the embedding
alone leaves the head as it was, one of the head leaves the embedding. The model that was trained
has two weights then, and so has the output. What decides is how the model was trained, not what
merging into one shared weight would do.

Adapters of classifiers and reward models on a language model: another head, another class.

PEFT trains them on the language model's body under a new head (`score`), which the adapter brings.
The output is the classifier: the body, that head instead of the language model's, and a config that
names the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.config import is_of_5
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import Problem
from merge_cli.lora.config import by_pattern

# Module -> the head that is tied to it, below the same prefix or one that ends a level higher.
_HEADS = {
    "embed_tokens": "lm_head",
    "wte": "lm_head",
    "word_embeddings": "lm_head",
    "embed_in": "embed_out",
    "tok_embeddings": "output",
}
HEADS = ("lm_head", "embed_out")
_TRAINED_AS_ONE = ("embed_tokens", "lm_head")  # what PEFT's ensure_weight_tying looks for
_SPEAKING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# What architectures tie in more places than two, or scale where it is tied.
_WORDS = frozenset(("shared", "embed_tokens", "word_embeddings", "lm_head", "decoder"))
_AGAIN = (
    "Save the adapter again with `save_embedding_layers=True`, or resize the base first "
    "(`resize_token_embeddings`, `save_pretrained`) and name the result as base."
)


@dataclass(frozen=True)
class EmbeddingAndHead:
    """A model's embedding and head.

    Attributes:
        embedding: its weight's name; None where none is known.
        head: the name of the head's weight, which a tied model need not store.
        tied: whether the head is the embedding, as the config and the files say.
    """

    embedding: str | None
    head: str
    tied: bool


def find_ends(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> EmbeddingAndHead:
    """Which tensors are a model's input embedding and output head."""
    head = next((n for n in tensors if n.endswith(("lm_head.weight", "embed_out.weight"))), None)
    found = [
        name
        for name, ref in tensors.items()
        if name.endswith(".weight") and len(ref.shape) == 2 and _module(name) in _HEADS
    ]
    if head is not None and tensors[head].shape:
        width = tensors[head].shape[1:]
        found = [name for name in found if tensors[name].shape[1:] == width]
    # Towers for images and sound have embeddings, too: the text's come first, then short names.
    embedding = min(
        found, key=lambda n: ("text" not in n and "language" not in n, len(n)), default=None
    )
    if head is None and embedding is not None and _has_head(config):
        head = _head_of(embedding)
    tied = head is not None and _ties(config, head, tensors)
    return EmbeddingAndHead(embedding, head or "lm_head.weight", tied)


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the class that the config names gives out words; one that is not named may."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return not isinstance(first, str) or first.endswith(_SPEAKING)


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _head_of(embedding: str) -> str:
    """The head's name in a model that stores this embedding."""
    prefix = embedding.removesuffix(f"{_module(embedding)}.weight")
    # `language_model.model.` has its head inside; transformers 5 has it outside of everything.
    outer = prefix.removesuffix("model.") if prefix.endswith("language_model.model.") else ""
    outer = outer or (prefix.removesuffix("model.") if prefix == "thinker.model." else "")
    return f"{outer}{_HEADS[_module(embedding)]}.weight"


def _ties(config: Mapping[str, Any], head: str | None, tensors: Mapping[str, Tensor]) -> bool:
    for item in (config, config.get("text_config")):
        if isinstance(item, dict) and "tie_word_embeddings" in item:
            stored = head in tensors  # transformers 5 stores none that is the embedding
            return bool(item["tie_word_embeddings"]) and not (stored and is_of_5(config))
    return head is not None and head not in tensors


@dataclass
class TiedUpdate:
    """The decision: tensors as they are after it, and what is said of it."""

    tensors: dict[str, Tensor]
    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def untie(
    base: Mapping[str, Tensor],
    ends: EmbeddingAndHead,
    config: Mapping[str, Any],
    *,
    trained: frozenset[str],
    adapter: Mapping[str, Any],
    label: str,
) -> TiedUpdate:
    """The base's tensors, with a head of its own where the adapter trains one end alone.

    Args:
        base: with what the adapter has copied of its embedding, before anything is trained.
        trained: names of weights that the adapter trains.
        adapter: its config.
    """
    joint = TiedUpdate(dict(base))
    joint.problems += _elsewhere(config, trained, label)
    if joint.problems:
        return joint
    if not ends.tied or ends.embedding is None:
        return joint
    both = {ends.embedding, ends.head}
    if not trained & both:
        return joint
    if keeps_ties(adapter):
        joint.tensors.pop(ends.head, None)
        joint.notes.append(f"{ends.head} stays tied to {ends.embedding} (ensure_weight_tying)")
        return joint
    embedding = joint.tensors[ends.embedding]
    joint.tensors[ends.head] = embedding
    joint.changes["tie_word_embeddings"] = False
    whose = " and ".join(sorted(trained & both))
    rest = "" if trained >= both else "; the other one stays the base's"
    joint.notes.append(
        f"the base ties {ends.head} to {ends.embedding}, and the adapter trains {whose} apart"
        f"{rest}: the output stores both (tie_word_embeddings: true -> false)"
    )
    return joint


def keeps_ties(adapter: Mapping[str, Any]) -> bool:
    """Whether PEFT trained both ends as one: it was asked to, and knows an end by its name.

    Raises:
        SourceError: an expression that takes too long.
    """
    if not adapter.get("ensure_weight_tying"):
        return False
    targets = adapter.get("target_modules") or []
    if isinstance(targets, str):
        if any(by_pattern({targets: True}, end, False) for end in _TRAINED_AS_ONE):
            return True
        targets = []
    saved = adapter.get("modules_to_save") or []
    if any(item.rpartition(".")[2] in _TRAINED_AS_ONE for item in (*saved, *targets)):
        return True
    # Of an embedding and its head PEFT takes the head off the list, and adds the embedding's path.
    return any(one.rpartition(".")[2] in set(saved) - {one} for one in saved)


def _elsewhere(config: Mapping[str, Any], trained: frozenset[str], label: str) -> list[Problem]:
    """Trained words of models that tie them in other ways: to an encoder's, scaled, masked."""
    named = (config.get("architectures") or [""])[0]
    masked = isinstance(named, str) and named.endswith(("ForMaskedLM", "ForPreTraining"))
    ties = config.get("tie_word_embeddings", True)
    if not ties or not (masked or config.get("is_encoder_decoder")):
        return []
    message = (
        f"{label}: the adapter trains a weight that {named or 'this model'} has in several places"
    )
    hint = "Merge it into its base with PEFT (`merge_and_unload`), and name the result."
    result = sorted(name for name in trained if _module(name) in _WORDS)
    return [Problem(message, name, hint=hint) for name in result]


def match_heights(
    tensors: dict[str, Tensor], ends: EmbeddingAndHead, untouched: frozenset[str], label: str
) -> tuple[list[str], list[Problem], int | None]:
    """Bring an end that the adapter leaves alone to the height of the one that it brings.

    Args:
        tensors: changed in place.
        untouched: weights that are the base's.

    Returns:
        notes, problems, and the number of rows where it can be told.
    """
    if ends.embedding is None or ends.embedding not in tensors:
        return [], [], None
    rows = tensors[ends.embedding].shape[0]
    if ends.head not in tensors:
        return [], [], rows
    other = tensors[ends.head].shape[0]
    if rows == other:
        return [], [], rows
    short, long = sorted(((rows, ends.embedding), (other, ends.head)))
    bias = ends.head.removesuffix("weight") + "bias"
    if (
        long[1] in untouched
        and isinstance(tensors[long[1]], TensorRef)
        and short[1] not in untouched
    ):
        # Resizing a model cuts both ends: what is left of the base's are its first rows.
        for name in (long[1], *([bias] if long[1] == ends.head and bias in tensors else ())):
            ref = tensors[name]
            if isinstance(ref, TensorRef):
                tensors[name] = _cut(ref, short[0])
        note = f"{long[1]}: cut from {long[0]} to {short[0]} rows, as the adapter's {short[1]} has"
        return [note], [], short[0]
    message = (
        f"{label}: {ends.embedding} has {rows} rows and {ends.head} has {other}; "
        "the model was resized, and the adapter holds only one of the two"
    )
    return [], [Problem(message, short[1], hint=_AGAIN)], None


def _cut(ref: TensorRef, rows: int) -> TensorRef:
    """A tensor's first rows: what is stored first."""
    shape = (rows, *ref.shape[1:])
    return ref._replace(shape=shape, nbytes=ref.nbytes // ref.shape[0] * rows)


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with what an adapter changes, where the model keeps it."""
    result: dict[str, Any] = dict(config)
    for nested in ("text_config", "llm_config"):
        if isinstance(result.get(nested), dict):
            result[nested] = dict(result[nested])
    parts = [
        result,
        *(result[n] for n in ("text_config", "llm_config") if isinstance(result.get(n), dict)),
    ]
    for key, value in changes.items():
        holders = [part for part in parts if key in part]
        for part in holders or [result]:
            part[key] = value
        if key == "tie_word_embeddings":
            result[key] = value
    return result


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
    ending = next((item for item in _LANGUAGE if base.endswith(item)), "")
    target = base.removesuffix(ending) + suffix if suffix and ending else ""
    weight = brought.get("score.weight")
    extra = [name for name in brought if name not in ("score.weight", "score.bias")]
    fits = weight is not None and len(weight.shape) == 2 and weight.shape[1] == width
    result = TaskHead()
    if not target or weight is None or extra or not fits or not _exists(target):
        for name, ref in brought.items():
            message = (
                f"{label}: the adapter brings a head {list(ref.shape)} for {task or 'another task'}"
                f", which {base or 'the model'} lacks"
            )
            result.problems.append(Problem(message, name, hint=_WAY_OUT))
        return result
    result.tensors = dict(brought)
    result.changes = {"architectures": [target], **labels(config, weight.shape[0])}
    result.notes.append(
        f"the adapter brings a head (score, {weight.shape[0]} labels): the output is a {target}, "
        f"without the head of {base}"
    )
    if config.get("pad_token_id") is None:
        result.notes.append(
            "config.json has no pad_token_id, which classifiers need for batches "
            "of more than one row"
        )
    return result


def labels(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Keys of the config that say how many labels there are; empty where it says so already."""
    cached = config.get("id2label")
    if (len(cached) if isinstance(cached, dict) else 2) == count:
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
