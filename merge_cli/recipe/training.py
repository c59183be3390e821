"""The `training:` section of a recipe whose method learns: options, and which ones contradict.

Each option is a field with its default, bounds and one line of help. `training_presets.py` reads
them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from merge_cli.recipe.forms import Checked, Nullable, Plain, Texts, any_of, finite
from merge_cli.recipe.reader import Form, Schema
from merge_cli.recipe.sections import option, section_of

Granularity = Literal["tensor", "column", "row", "element", "low_rank"]
Preset = Literal["default", "dam", "dam-reference", "adamerging", "expert-merging", "learned-soup"]
EMBEDDINGS = "embeddings"
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
# Merges that are no sum of columns: learning starts from them as they are.
WHOLE_STARTS = ("fisher", "regmean")
LOSSES = ("kl", "reverse_kl", "mse", "entropy", "cross_entropy")
TEACHING = frozenset(("kl", "reverse_kl", "mse"))  # the losses that need a teacher
ROLLOUTS_TERM = "rollouts"  # what the loss on rollouts is called in records and reports
PENALTIES = ("cosine", "l1", "l2", "overlap", "weighted_overlap")


def _granularity(value: Any) -> tuple[Any, str]:
    """A word for all tensors, or a mapping of patterns to words."""
    if isinstance(value, dict) and value and all(kind in GRANULARITIES for kind in value.values()):
        return value, ""
    if isinstance(value, str) and value in GRANULARITIES:
        return value, ""
    words = ", ".join(GRANULARITIES)
    return None, f"must be one of {words}, or parts of tensor names with one of them each"


def _weights_of(names: tuple[str, ...]) -> Form:
    """A name alone, or a mapping of names to weights."""

    def read(value: Any) -> tuple[Any, str]:
        if isinstance(value, str) and value in names:
            return {value: 1.0}, ""
        if value is None or value == {}:
            return {}, ""
        if isinstance(value, dict) and set(value) <= set(names):
            weights = {name: finite(weight) for name, weight in value.items()}
            if all(weight is not None and weight >= 0 for weight in weights.values()):
                return weights, ""
        message = f"must be one of {', '.join(names)}, or weights of at least 0 for some of them"
        return None, message

    weight = Plain(float, 0).schema()
    listed: Schema = {"properties": dict.fromkeys(names, weight), "additionalProperties": False}
    options: list[Schema] = [{"enum": list(names)}, {"type": "object", **listed}, {"type": "null"}]
    return Checked(read, any_of(*options), names)


_GRANULARITY: Schema = any_of(
    {"enum": list(GRANULARITIES)},
    {
        "type": "object",
        "additionalProperties": {"enum": list(GRANULARITIES)},
        "minProperties": 1,
    },
)


@dataclass(frozen=True)
class Rollouts:
    """What the student says itself during training, and how much it counts."""

    length: int = option(16, "tokens that the merged model samples after each prefix", 1)
    prefix: int = option(32, "tokens of a text to begin after; a prompt is the prefix it is", 1)
    weight: float = option(1.0, "of the reverse KL in the loss", 0)
    every: int = option(1, "steps between those that sample", 1)
    temperature: float = option(1.0, "temperature of sampling", 1e-3)


# What changes no coefficient; a preset is what its options come to.
INDIFFERENT = frozenset(("residency", "checkpoint_minutes", "tensorboard", "preset"))


@dataclass(frozen=True)
class Training:
    """How coefficients are learned. Shares are between 0 and 1; None is explained by the help."""

    preset: Preset = option("default", "a set of defaults for the options below")
    granularity: Granularity | Mapping[str, Granularity] = option(
        {EMBEDDINGS: "row", "*": "column"},
        "what one coefficient covers, or parts of tensor names with what it covers there",
        form=Checked(_granularity, _GRANULARITY, GRANULARITIES),
    )
    rank: int = option(4, "rank of the correction to the columns, with granularity low_rank", 1)
    form: Literal["auto", "soup", "task_vector"] = option(
        "auto",
        "sum of c_i * W_i, or the base plus the sum of c_i * (W_i - base); auto: the second where "
        "the recipe has a base model",
    )
    activation: Literal["none", "tanh", "sigmoid", "softmax"] = option(
        "none", "what a parameter goes through to become a coefficient"
    )
    start: float | Literal["best", "soup", "raw_soup", "task_arithmetic", "fisher", "regmean"] = (
        option(
            "best",
            "every coefficient at the beginning: a number, 1/sources (soup), the activation of "
            "1/sources (raw_soup), 0.3 (task_arithmetic); or a whole merge (fisher, regmean), of "
            "which changes are learned; or best: the merge without training that does best on "
            "held-out rows",
        )
    )
    baselines: bool = option(
        True,
        "measure merges without training on held-out rows, to start at the best and to compare "
        "with; false: only the one that learning starts from",
    )
    train: tuple[str, ...] = option(
        ("all",),
        "all, linear, or parts of tensor names",
        form=Texts("must be all, linear, or a list of parts of tensor names"),
    )
    loss: Mapping[str, float] = option(
        {"kl": 1.0}, "a loss, or losses with their weights", form=_weights_of(LOSSES)
    )
    temperature: float = option(
        1.0, "temperature of teacher and student in kl, reverse_kl and mse", 1e-3
    )
    regularize: Mapping[str, float] = option(
        {}, "penalties with their weights", form=_weights_of(PENALTIES)
    )
    penalize: Literal["coefficients", "parameters"] = option(
        "coefficients",
        "what penalties are taken of: the coefficients, or their parameters before the activation",
    )
    prompt_loss: bool = option(False, "whether tokens of a prompt count too")
    top_k: int | Literal["full"] = option(
        64,
        "likeliest tokens to store of a teacher's prediction; full keeps all, in memory",
        1,
    )
    cache_dtype: Literal["float32", "float16"] = option(
        "float32", "dtype of a teacher's stored predictions"
    )
    max_length: int = option(2048, "tokens of an example; longer rows are cut into several", 2)
    examples: int | None = option(None, "examples of each source to train on; default all", 1)
    held_out: float = option(
        0.1, "share of the rows kept for measuring, where no file is named", 0, 0.9
    )
    held_out_examples: int = option(64, "at most this many held-out examples for each source", 1)
    held_out_tokens: int | None = option(
        2048, "at most about this many of their tokens for each source; null for all", 1
    )
    rollouts: Rollouts | None = option(
        None,
        "learn on-policy, too: reverse KL to the teachers on what the merged model samples itself; "
        "a mapping of length, prefix, weight, every, temperature",
        form=Nullable(section_of(Rollouts)),
    )
    epochs: int = option(1, "passes over the largest source's examples, at most", 1)
    tokens: int | None = option(
        32_768,
        "train on at most about this many tokens of all sources; null for all of them",
        1,
    )
    max_steps: int | None = option(None, "steps at most; default as many as the epochs take", 1)
    batch_size: int = option(2, "examples of each source in a step", 1)
    batch_tokens: int = option(4096, "tokens in one forward pass; more are passed one by one", 1)
    learning_rate: float = option(0.02, "the largest learning rate of the schedule", 0)
    schedule: Literal["constant", "cosine", "linear"] = option(
        "cosine", "how the learning rate falls after the warm-up"
    )
    warmup: float = option(0.0, "share of the steps in which the rate grows", 0, 1)
    optimizer: Literal["adamw", "mofo"] = option(
        "adamw", "adamw, or mofo: MoFO moves only the coefficients with the largest momenta"
    )
    mofo_fraction: float = option(
        0.3, "share of each tensor's coefficients that MoFO moves", 1e-6, 1
    )
    weight_decay: float = option(0.0, "decoupled weight decay of coefficients, towards 0", 0)
    clip_norm: float | None = option(None, "largest norm of all gradients together", 0)
    mode: Literal["auto", "fused", "two_pass"] = option(
        "auto", "fused: update inside the last backward pass; two_pass: after it"
    )
    residency: Literal["auto", "device", "host", "disk"] = option(
        "auto", "where the sources' weights are kept"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype of the student and the teachers; coefficients are float32"
    )
    checkpointing: bool = option(False, "compute activations twice instead of keeping them")
    evaluate_every: int | None = option(
        None,
        "steps between held-out measurements; default the end, and at halves of the way as far as "
        "that costs a tenth of the training",
        1,
    )
    patience: int | None = option(None, "measurements without improvement before training stops", 1)
    keep: Literal["best", "last"] = option(
        "best", "the step whose coefficients are kept: best on held-out rows, or last"
    )
    checkpoint_minutes: float = option(2.0, "minutes between checkpoints", 0)
    tensorboard: bool = option(False, "write scalars for TensorBoard beside the checkpoint")

    def granularity_of(self, name: str, *, embedding: bool = False) -> Granularity:
        """What one coefficient of a tensor covers: of several patterns the first that matches.

        A pattern is a part of the tensor's name, a whole name with `*`, or `embeddings`: tokens in
        and out, whatever a model calls them. What no pattern matches has a coefficient for each
        column.
        """
        if isinstance(self.granularity, str):
            return self.granularity
        for pattern, kind in self.granularity.items():
            if (embedding and pattern == EMBEDDINGS) or _matches(pattern, name):
                return kind
        return "column"

    def unused_patterns(self, names: Collection[str]) -> list[str]:
        """Patterns of `granularity` that match no tensor: most likely misspelt."""
        patterns = [] if isinstance(self.granularity, str) else list(self.granularity)
        return [
            pattern
            for pattern in patterns
            if pattern != EMBEDDINGS and not any(_matches(pattern, name) for name in names)
        ]

    def resolved(self, *, has_base: bool) -> Training:
        """With the form that `auto` means for a recipe."""
        if self.form != "auto":
            return self
        return replace(self, form="task_vector" if has_base else "soup")

    @property
    def needs_teachers(self) -> bool:
        """Whether a loss compares with the sources' predictions."""
        return any(weight for name, weight in self.loss.items() if name in TEACHING)


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) if "*" in pattern else pattern in name


def plain_training(training: Training) -> dict[str, Any]:
    """Every option as YAML writes it: a resolved recipe leaves nothing to defaults."""
    result: dict[str, Any] = {}
    for f in fields(Training):
        value = getattr(training, f.name)
        if value is None and f.default is None:
            continue
        result[f.name] = (
            list(value)
            if isinstance(value, tuple)
            else dict(value)
            if isinstance(value, Mapping)
            else asdict(value)
            if isinstance(value, Rollouts)
            else value
        )
    return result


def contradictions(training: Training, sources: int) -> list[tuple[str, str, str]]:
    """Options that do not go together: (option, message, hint)."""
    result = []
    start, activation = training.start, training.activation
    if start in WHOLE_STARTS and training.form == "soup":
        message = f"sums of weights do not reach the merge that {start} makes."
        result.append(("start", message, "Leave `form` out, or use another `start`."))
    if start in ("best", *WHOLE_STARTS) and activation != "none":
        message = f"{activation} does not reach every merge that it may begin from."
        result.append(("start", message, "Use `start: soup`, or `activation: none`."))
    if start == "best" and not training.baselines:
        message = "without them nobody knows where the best is."
        result.append(
            ("baselines", message, "Leave it out, or say where to start (`start: soup`).")
        )
    if activation == "softmax" and start not in ("soup", "raw_soup", "best"):
        result.append(("start", "softmax starts every source at 1/sources.", "Leave `start` out."))
    if isinstance(start, float) and activation == "tanh" and not -1 < start < 1:
        result.append(("start", f"tanh reaches only -1 to 1 (got {start:g}).", ""))
    if isinstance(start, float) and activation == "sigmoid" and not 0 < start < 1:
        result.append(("start", f"sigmoid reaches only 0 to 1 (got {start:g}).", ""))
    if start == "soup" and sources < 2 and activation in ("sigmoid", "tanh"):
        message = f"{training.activation} does not reach 1, where one source starts."
        result.append(("activation", message, "Use `activation: none`, or give a `start` below 1."))
    if training.keep == "last" and training.patience is not None:
        message = "the last step is kept, whatever was measured before it."
        result.append(("patience", message, "Leave `patience` out, or use `keep: best`."))
    if training.mode == "fused" and training.clip_norm is not None:
        message = "clipping needs all gradients before the first update."
        result.append(("mode", message, "Use `mode: two_pass`, or leave `clip_norm` out."))
    if training.rollouts is not None and training.rollouts.length >= training.max_length:
        message = f"{training.rollouts.length} tokens leave no room in max_length for a prefix."
        result.append(("rollouts", message, "Use a smaller `length`, or a larger `max_length`."))
    if training.mode == "fused" and training.dtype == "float16":
        message = "float16 gradients can overflow, and a fused update cannot be taken back."
        result.append(("mode", message, "Use `mode: two_pass`, or bfloat16."))
    if not any(training.loss.values()):
        result.append(("loss", "every loss has the weight 0.", ""))
    return result
