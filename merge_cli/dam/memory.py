"""What training holds, from config and headers alone: activations, gradients, coefficients, peak.

    device   student + activations + two gradients + coefficients + blocks of rows + logits of a
             chunk + sources, where they stay there
    host     the interpreter, held-out predictions, the best coefficients + sources, where they
             wait there; on a CPU the two are one

Teachers run one at a time before the student is loaded, and take less than it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.dam.data import Dataset
from merge_cli.dam.forward import CHUNK_BYTES
from merge_cli.dam.models import TargetParameter
from merge_cli.dam.rollouts import rollout_bytes
from merge_cli.dam.sources import block_bytes
from merge_cli.recipe.training import Training

# Python with torch and transformers: seen by scripts/bench_dam.py memory, on a CPU.
_INTERPRETER = 450_000_000
# Logits of a chunk in float32: themselves, divided by the temperature, two normalisers' temporary
# copies, and their gradient.
_CHUNK_COPIES = 5
# Of each coefficient: parameter, value, projection, gradient, and two moments.
_PER_COEFFICIENT = 6


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes of each part of a training, without the sources.

    Attributes:
        activations: what the largest forward pass keeps for its backward pass.
        gradients: the output layer's, which waits from the forward pass on, and the largest other.
        coefficients: with gradients and moments, and the best ones so far.
        blocks: rows of the sources that are being projected, and a chunk's logits.
        predictions: of teachers that stay in memory; on the host.
        rollouts: predictions of tokens that the student samples; on the host.
        interpreter: on the host.
    """

    student: int
    activations: int
    gradients: int
    coefficients: int
    blocks: int
    predictions: int
    rollouts: int = 0
    interpreter: int = _INTERPRETER

    @property
    def beside_sources(self) -> int:
        """Of the student's device, without the sources."""
        return self.student + self.activations + self.gradients + self.coefficients + self.blocks

    @property
    def on_host(self) -> int:
        """Of the host alone."""
        return self.predictions + self.rollouts + self.interpreter

    def to_json(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Peak:
    """The most that is held at once: on the student's device (None on a CPU), and on the host."""

    device: int | None
    host: int


def peak_of(needs: MemoryNeeds, sources: int, residency: str, *, on_cpu: bool) -> Peak:
    """With the sources where they are kept; those on disk pass through in blocks."""
    waiting = sources if residency == "host" else 0
    if on_cpu:
        return Peak(None, needs.beside_sources + needs.on_host + waiting)
    on_device = sources if residency == "device" else 0
    return Peak(needs.beside_sources + on_device, needs.on_host + waiting)


def activation_bytes(
    config: Any, rows: int, length: int, width: int, *, checkpointing: bool
) -> int:
    """What autograd keeps of a forward pass through a transformer of gated layers.

    With h the hidden size, a the width of all heads together, n their number, i the width of the
    feed-forward layer (of all experts that a token passes), w bytes of a number and t = rows *
    length tokens, a layer keeps

        t * (2 * (4 + 2w) * h   two norms: a float32 copy, the normalised input, the output
             + 4w * a + 4 * n   queries, keys and values (repeated for every head), what comes out,
                                and a float32 normaliser for each head
             + 4w * i           gate, its activation, up, and their product
             + w * length       the mask, which attention makes anew in every layer
             + 2w * n * length) scores and their softmax, where attention is `eager`

    and the last norm with the counted hidden states and their gradient (4 + 4w) * h. Checkpointed,
    a layer keeps its input, w * h, and one layer at a time the rest. Layers of other kinds (plain
    feed-forward, state spaces) are taken for gated ones: expect up to twice as much or half.

    Args:
        config: transformers', of the whole model.
        rows, length: of the largest batch, padding included.
        width: bytes of an activation.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    attention = heads * int(getattr(text, "head_dim", None) or hidden // heads)
    eager = getattr(text, "_attn_implementation", None) == "eager"
    layer = (
        2 * (4 + 2 * width) * hidden
        + 4 * width * attention
        + 4 * heads
        + 4 * width * _feed_forward(text, hidden)
        + width * length * (1 + 2 * heads * eager)
    )
    kept = layers * width * hidden + layer if checkpointing else layers * layer
    return rows * length * (kept + (4 + 4 * width) * hidden)


def _feed_forward(text: Any, hidden: int) -> int:
    """The width of the feed-forward layer; of all experts that one token passes through."""
    names = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")
    widths = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    inner = widths[0] if widths else 4 * hidden
    counts = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
    experts = [value for name in counts if isinstance(value := getattr(text, name, None), int)]
    if not experts:
        return inner
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return experts[0] * inner + int(shared)


def largest_batch(datasets: Sequence[Dataset], training: Training) -> tuple[int, int]:
    """Rows and length, at most, of the largest forward pass of a training step.

    Sequences of all data sets share it within `batch_tokens`, padding included; one alone may be
    longer than that.
    """
    longest = max(len(example.ids) for dataset in datasets for example in dataset.train)
    rows = sum(min(training.batch_size, len(dataset.train)) for dataset in datasets)
    return max(1, min(rows, training.batch_tokens // longest)), longest


def memory_needs(
    net: Any,
    targets: Sequence[TargetParameter],
    datasets: Sequence[Dataset],
    training: Training,
    *,
    sources: int,
    dtype: str,
    predictions: int,
    on_cpu: bool,
) -> MemoryNeeds:
    """What a training takes beside the sources' weights.

    Args:
        net: the student, without weights.
        sources: how many there are.
        predictions: bytes of teachers' predictions that stay in memory.
    """
    width = width_of(dtype)
    rows, length = largest_batch(datasets, training)
    activations = activation_bytes(
        net.config, rows, length, width, checkpointing=training.checkpointing
    )
    largest = max(parameter.numel() for parameter in net.parameters())
    head = net.get_output_embeddings().weight
    logits = min(CHUNK_BYTES, 4 * rows * length * len(head))
    numbers = sum(target.count for target in targets)
    return MemoryNeeds(
        student=sum(target.task.size for target in targets if target.held) * width,
        activations=activations,
        gradients=(head.numel() + largest) * width,
        coefficients=(_PER_COEFFICIENT + 1) * 4 * numbers,
        blocks=block_bytes(sources, largest, on_cpu=on_cpu) + _CHUNK_COPIES * logits,
        predictions=predictions,
        rollouts=rollout_bytes(
            training.rollouts,
            sum(min(training.batch_size, len(dataset.train)) for dataset in datasets),
            len(head) if training.top_k == "full" else min(int(training.top_k), len(head)),
        ),
    )
