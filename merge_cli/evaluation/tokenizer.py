"""A model's tokenizer alone, without its weights."""

from __future__ import annotations

from typing import Any

from merge_cli.checkpoint.source import Source
from merge_cli.errors import SourceError
from merge_cli.evaluation.live import quiet_libraries


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of an opened source; nothing of the checkpoint is executed.

    Raises:
        SourceError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with quiet_libraries():
        try:
            return AutoTokenizer.from_pretrained(str(source.root), trust_remote_code=False)
        except Exception as error:  # the package tokenizers raises nothing more special
            said = str(error).strip().splitlines() or [type(error).__name__]
            what = f"its tokenizer cannot be loaded: {said[0]}"
            hint = "The text is read with it."
            raise SourceError(what, model=source.label, hint=hint) from error
