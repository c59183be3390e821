"""Answers of a loaded model: sampled with a seed, streamed as they are written, stopped on request.

An answer is a function of the model, the prompt, the sampling options and the seed. The seed of
an answer is drawn from the user's seed and the number of answers before it, so that asking the same
again in one conversation may give another answer, and repeating the conversation does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from merge_cli.errors import UsageError
from merge_cli.evaluation.forward import require_finite
from merge_cli.evaluation.guards import memory_errors, quiet_libraries
from merge_cli.evaluation.live import LiveModel

# float32 divides by no more and no less than this. Below and above, nothing changes any more: the
# likeliest token is taken, or all are equally likely.
_COLDEST, _HOTTEST = 1e-37, 1e37
_SMALLER = "Try a smaller --max-tokens, or --dtype bfloat16."

Ended = Literal["end", "length", "stopped"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; higher values are more varied.
        top_p: draw from the likeliest tokens that together have this probability.
        max_tokens: tokens of an answer.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature must be 0 or more (got {self.temperature:g})")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1 (got {self.top_p:g})")
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens must be 1 or more (got {self.max_tokens})")


@dataclass(frozen=True)
class Answer:
    """What a model has written.

    Attributes:
        tokens: their number, the one that ends the text included.
        ended: by the model, by `max_tokens` or the context, or by the user.
    """

    text: str
    tokens: int
    ended: Ended


def answer(
    live: LiveModel,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    turn: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Continue a prompt.

    Args:
        ids: tokens of the prompt, at least one, fewer than the model's context.
        turn: how many answers the conversation has already.
        on_text: called with every piece of the answer, as it is written.
        is_stopped: asked after every token.

    Raises:
        NonFiniteError: the model predicts NaN or Inf.
        ResourceError: memory ran out.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

    class Stream(TextStreamer):  # type: ignore[misc]  # transformers has no types here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    class Stop(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
        def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
            done = torch.full((len(input_ids),), is_stopped(), device=input_ids.device)
            return done

    def finite(_: Any, logits: Any) -> Any:
        require_finite(logits.float().logsumexp(-1), live.label)
        return _divisible(logits, config.temperature) if config.do_sample else logits

    room = min(sampling.max_tokens, live.max_length - len(ids))
    config = _generation(live, sampling, room)
    defaults, device = live.net.generation_config, live.input_device
    prompt = torch.tensor([list(ids)], dtype=torch.long, device=device)
    live.net.generation_config = config
    cuda = [device] if device.startswith("cuda") else []
    try:
        with (
            torch.inference_mode(),
            torch.random.fork_rng(devices=cuda),
            quiet_libraries(),
            memory_errors(live.label, _SMALLER),
        ):
            torch.manual_seed(_seed(sampling.seed, turn))
            written = live.net.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                logits_processor=[finite],
                stopping_criteria=StoppingCriteriaList([Stop()]),
                streamer=Stream(live.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )[0, len(ids) :].tolist()
    finally:
        live.net.generation_config = defaults
    live.count(len(ids) + len(written), len(written))
    ended: Ended = "length"
    if written and written[-1] in _ends(config.eos_token_id):
        ended = "end"
    elif is_stopped():
        ended = "stopped"
    return Answer(live.tokenizer.decode(written, skip_special_tokens=True), len(written), ended)


def _generation(live: LiveModel, sampling: Sampling, room: int) -> Any:
    """The options of transformers, without a model's own: two models are asked alike."""
    from transformers import GenerationConfig

    configured = live.net.generation_config.eos_token_id
    ends = _ends(configured if configured is not None else live.tokenizer.eos_token_id)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": min(max(sampling.temperature, _COLDEST), _HOTTEST),
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    return GenerationConfig(
        max_new_tokens=room,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **options,
    )


def _divisible(logits: Any, temperature: float) -> Any:
    """Logits that have a probability at a temperature: [n, tokens].

    Divided by very little, the largest would overflow. Only differences count, so that it may as
    well be 0: then the others overflow to a probability of 0.
    """
    largest = logits.amax(-1, keepdim=True)
    return logits if bool((largest / temperature).isfinite().all()) else logits - largest


def _ends(tokens: int | Sequence[int] | None) -> list[int]:
    """The tokens that end a text."""
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)


def _seed(seed: int, turn: int) -> int:
    """The seed of one answer, 63 bits."""
    digest = hashlib.sha256(f"{seed} {turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
