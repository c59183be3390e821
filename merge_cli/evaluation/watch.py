"""What must hold of every prediction, whoever asks for it: known tokens in, finite numbers out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from merge_cli.errors import NonFiniteError, SourceError
from merge_cli.evaluation.live import LiveModel


@contextmanager
def watched(live: LiveModel) -> Iterator[None]:
    """Watch what others do with the net: count its tokens (padding included) and its passes.

    What they make of tokens that it does not have, or of predictions that are no numbers, may be
    any score at all. So both are errors here:

    Raises:
        SourceError: a token beyond its embeddings.
        NonFiniteError: it predicts NaN or Inf.
    """
    entries = live.entries

    def before(net: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = args[0] if args else named.get("input_ids")
        if ids is None:  # embeddings, which have no number
            return
        live.count(ids.numel(), 1)
        if ids.numel() and int(ids.max()) >= entries:
            what = (
                f"the token number {int(ids.max())} is asked for, and it has {entries:,} embeddings"
            )
            hint = "The tokenizer is not this model's."
            raise SourceError(what, model=live.label, hint=hint)

    def after(net: Any, args: tuple[Any, ...], found: Any) -> None:
        logits = getattr(found, "logits", None)
        if logits is not None:
            require_finite(logits.float().logsumexp(-1), live.label)

    hooks = [
        live.net.register_forward_pre_hook(before, with_kwargs=True),
        live.net.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_finite(values: Any, label: str) -> None:
    """Refuse predictions that are no numbers, whatever a score would make of them.

    Args:
        values: a tensor that is finite where logits are: losses, or their log-sum-exp.

    Raises:
        NonFiniteError: NaN or Inf is among them.
    """
    if not bool(values.isfinite().all()):
        what = "it predicts NaN or Inf: no score of it means anything"
        hint = "Try --dtype float32; if that does not help, its weights are broken."
        raise NonFiniteError(what, model=label, hint=hint)
