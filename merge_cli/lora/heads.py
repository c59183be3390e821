"""What an adapter does to a model's embedding and head: untie or resize them.

A tied head is the embedding's weight. PEFT copies what it trains: an adapter of the embedding
alone leaves the head as it was, one of the head leaves the embedding. The trained model then has
two weights, and so has the output. Heads of other tasks are in task_heads.py.
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

# Embedding -> the head that is tied to it, below the same prefix or the prefix one level higher.
_HEADS = {
    "embed_tokens": "lm_head",
    "wte": "lm_head",
    "word_embeddings": "lm_head",
    "embed_in": "embed_out",
    "tok_embeddings": "output",
}
HEADS = ("lm_head", "embed_out")
_TRAINED_AS_ONE = ("embed_tokens", "lm_head")  # what PEFT's ensure_weight_tying looks for
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Modules whose weight some architectures tie more than once, or scale where it is tied.
_SHARED_MODULES = frozenset(("shared", "embed_tokens", "word_embeddings", "lm_head", "decoder"))
_SAVE_AGAIN = (
    "Save the adapter again with `save_embedding_layers=True`, or resize the base first "
    "(`resize_token_embeddings`, `save_pretrained`) and name the result as base."
)


@dataclass(frozen=True)
class EmbeddingAndHead:
    """A model's embedding and head.

    Attributes:
        embedding: its weight's name; None where the model has none that is recognised.
        head: the name of the head's weight, which a tied model need not store.
        tied: whether the head is the embedding, as the config and the files say.
    """

    embedding: str | None
    head: str
    tied: bool


def find_embedding_and_head(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> EmbeddingAndHead:
    """Which tensors are a model's input embedding and output head."""
    head = next((n for n in tensors if n.endswith(("lm_head.weight", "embed_out.weight"))), None)
    candidates = [
        name
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and _module(name) in _HEADS
    ]
    if head is not None and tensors[head].shape:
        width = tensors[head].shape[1:]
        candidates = [name for name in candidates if tensors[name].shape[1:] == width]
    # Towers for images and sound have embeddings, too: the text's come first, then short names.
    embedding = min(
        candidates, key=lambda n: ("text" not in n and "language" not in n, len(n)), default=None
    )
    if head is None and embedding is not None and _has_head(config):
        head = _head_of(embedding)
    tied = head is not None and _ties(config, head, tensors)
    return EmbeddingAndHead(embedding, head or "lm_head.weight", tied)


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the class in the config has a language model's head; assumed where there is none."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return not isinstance(first, str) or first.endswith(GENERATIVE)


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
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and "tie_word_embeddings" in section:
            stored = head in tensors  # transformers 5 stores none that is the embedding
            return bool(section["tie_word_embeddings"]) and not (stored and is_of_5(config))
    return head is not None and head not in tensors


@dataclass
class HeadChange:
    """What an adapter changes at the embedding and the head.

    Attributes:
        tensors: the changed model's, or those of the new head.
        changes: keys of the model's config.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def untie(
    base: Mapping[str, Tensor],
    layers: EmbeddingAndHead,
    config: Mapping[str, Any],
    *,
    trained: frozenset[str],
    adapter: Mapping[str, Any],
    label: str,
) -> HeadChange:
    """The base's tensors, with a separate head where the adapter trains only one of tied layers.

    Args:
        base: with the adapter's resized copies of embeddings, before any update.
        trained: names of weights that the adapter trains.
        adapter: its config.
    """
    change = HeadChange(dict(base))
    change.problems += _other_ties(config, trained, label)
    if change.problems:
        return change
    if not layers.tied or layers.embedding is None:
        return change
    tied = {layers.embedding, layers.head}
    if not trained & tied:
        return change
    if keeps_ties(adapter):
        change.tensors.pop(layers.head, None)
        change.notes.append(f"{layers.head} stays tied to {layers.embedding} (ensure_weight_tying)")
        return change
    embedding = change.tensors[layers.embedding]
    change.tensors[layers.head] = embedding
    change.changes["tie_word_embeddings"] = False
    trained_names = " and ".join(sorted(trained & tied))
    remainder = "" if trained >= tied else "; the other one stays the base's"
    change.notes.append(
        f"the base ties {layers.head} to {layers.embedding}, and the adapter trains "
        f"{trained_names} apart{remainder}: the output stores both "
        "(tie_word_embeddings: true -> false)"
    )
    return change


def keeps_ties(adapter: Mapping[str, Any]) -> bool:
    """Whether PEFT trained embedding and head as one: it was asked to, and recognises a name.

    Raises:
        SourceError: an expression that takes too long.
    """
    if not adapter.get("ensure_weight_tying"):
        return False
    targets = adapter.get("target_modules") or []
    if isinstance(targets, str):
        if any(by_pattern({targets: True}, name, False) for name in _TRAINED_AS_ONE):
            return True
        targets = []
    saved = adapter.get("modules_to_save") or []
    if any(name.rpartition(".")[2] in _TRAINED_AS_ONE for name in (*saved, *targets)):
        return True
    # PEFT takes the head off the list, and adds the path of the embedding.
    return any(name.rpartition(".")[2] in set(saved) - {name} for name in saved)


def _other_ties(config: Mapping[str, Any], trained: frozenset[str], label: str) -> list[Problem]:
    """Trained embeddings of models that tie them in other ways: encoder-decoder, masked."""
    model_class = (config.get("architectures") or [""])[0]
    masked = isinstance(model_class, str) and model_class.endswith(
        ("ForMaskedLM", "ForPreTraining")
    )
    ties = config.get("tie_word_embeddings", True)
    if not ties or not (masked or config.get("is_encoder_decoder")):
        return []
    model_class = model_class or "this model"
    message = f"{label}: the adapter trains a weight that {model_class} uses more than once"
    hint = "Merge it into its base with PEFT (`merge_and_unload`), and name the result."
    shared = sorted(name for name in trained if _module(name) in _SHARED_MODULES)
    return [Problem(message, name, hint=hint) for name in shared]


def match_rows(
    tensors: dict[str, Tensor], layers: EmbeddingAndHead, untouched: frozenset[str], label: str
) -> tuple[list[str], list[Problem], int | None]:
    """Give embedding and head one number of rows, where the adapter resizes only one of them.

    Args:
        tensors: changed in place.
        untouched: weights that are the base's.

    Returns:
        notes, problems, and the number of rows where the model has an embedding.
    """
    if layers.embedding is None or layers.embedding not in tensors:
        return [], [], None
    embedding_rows = tensors[layers.embedding].shape[0]
    if layers.head not in tensors:
        return [], [], embedding_rows
    head_rows = tensors[layers.head].shape[0]
    if embedding_rows == head_rows:
        return [], [], embedding_rows
    short, long = sorted(((embedding_rows, layers.embedding), (head_rows, layers.head)))
    bias = layers.head.removesuffix("weight") + "bias"
    if (
        long[1] in untouched
        and isinstance(tensors[long[1]], TensorRef)
        and short[1] not in untouched
    ):
        # Resizing a model cuts both: what is left of the base's are its first rows.
        for name in (long[1], *([bias] if long[1] == layers.head and bias in tensors else ())):
            ref = tensors[name]
            if isinstance(ref, TensorRef):
                tensors[name] = _cut(ref, short[0])
        note = f"{long[1]}: cut from {long[0]} to {short[0]} rows, as the adapter's {short[1]} has"
        return [note], [], short[0]
    message = (
        f"{label}: {layers.embedding} has {embedding_rows} rows and {layers.head} has {head_rows}; "
        "the model was resized, and the adapter holds only one of the two"
    )
    return [], [Problem(message, short[1], hint=_SAVE_AGAIN)], None


def _cut(ref: TensorRef, rows: int) -> TensorRef:
    """The first rows of a stored tensor."""
    shape = (rows, *ref.shape[1:])
    return ref._replace(shape=shape, nbytes=ref.nbytes // ref.shape[0] * rows)


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with an adapter's changes, in the section that has each key."""
    changed: dict[str, Any] = dict(config)
    for nested in ("text_config", "llm_config"):
        if isinstance(changed.get(nested), dict):
            changed[nested] = dict(changed[nested])
    sections = [
        changed,
        *(changed[n] for n in ("text_config", "llm_config") if isinstance(changed.get(n), dict)),
    ]
    for key, value in changes.items():
        owners = [section for section in sections if key in section]
        for section in owners or [changed]:
            section[key] = value
        if key == "tie_word_embeddings":
            changed[key] = value
    return changed
