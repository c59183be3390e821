"""Tokenizers of every kind that matters, made on the spot from a few sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers as hf
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

VOCABULARY = 400
TEXTS = ["The cat sat on the mat. A cat!", "Answer: 42", "one two three  four",
         "日本語の文章です。", "caf\u00e9 caf\u0065\u0301 😀 👩‍🚀"] * 10  # fmt: skip
SPECIALS = ["<unk>", "<s>", "</s>"]
TEMPLATES = {"none": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}


def template(kind: str) -> Any:
    special = [("<s>", 1), ("</s>", 2)]
    return processors.TemplateProcessing(single=TEMPLATES[kind], special_tokens=special)


def make(
    before: Any, decoder: Any, around: str, *, normalizer: Any = None, trim: bool = False,
    named: bool = True, alphabet: Sequence[str] = (), words: bool = False,
) -> Any:  # fmt: skip
    """A fast tokenizer.

    Args:
        around: which special tokens it puts around a text.
        named: whether it says which token is BOS and EOS.
        words: WordPiece instead of BPE.
    """
    model = models.WordPiece(unk_token="<unk>") if words else models.BPE(unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if before is not None:
        tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoder
    kind = trainers.WordPieceTrainer if words else trainers.BpeTrainer
    trainer = kind(vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=list(alphabet),
                   show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    parts = [processors.ByteLevel(trim_offsets=True)] if trim else []
    tokenizer.post_processor = processors.Sequence([*parts, template(around)])
    names = {"bos_token": "<s>", "eos_token": "</s>"} if named else {}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def metaspace(scheme: str, around: str, **more: Any) -> Any:
    """As SentencePiece does it: a mark stands for a space, and before a text."""
    return make(pre_tokenizers.Metaspace(prepend_scheme=scheme),
                decoders.Metaspace(prepend_scheme=scheme), around, **more)  # fmt: skip


def byte_level(around: str, *, space: bool = False, **more: Any) -> Any:
    """As GPT-2 does it, or with a space before a text."""
    return make(pre_tokenizers.ByteLevel(add_prefix_space=space), decoders.ByteLevel(), around,
                alphabet=pre_tokenizers.ByteLevel.alphabet(), **more)  # fmt: skip


def legacy(around: str) -> Any:
    """As Llama 2's is converted: the mark is put there by normalising."""
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return make(None, decoders.Metaspace(), around, normalizer=normalizers.Sequence(marks))


def word_piece(around: str) -> Any:
    """As BERT does it."""
    return make(pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), around, named=False,
                normalizer=normalizers.BertNormalizer(), words=True)  # fmt: skip


KINDS: dict[str, Any] = {
    "metaspace, always, BOS": lambda: metaspace("always", "bos"),
    "metaspace, always, EOS (T5)": lambda: metaspace("always", "eos"),
    "metaspace, first, both": lambda: metaspace("first", "both"),
    "metaspace, never": lambda: metaspace("never", "none"),
    "normalised (Llama 2)": lambda: legacy("bos"),
    "bytes": lambda: byte_level("none", named=False),
    "bytes, BOS by name alone": lambda: byte_level("none"),
    "bytes, EOS": lambda: byte_level("eos"),
    "bytes, prefix space, trimmed offsets": lambda: byte_level("both", space=True, trim=True),
    "words (BERT)": lambda: word_piece("both"),
    "composed characters": lambda: byte_level("bos", normalizer=normalizers.NFC()),
    "slow (ByT5)": lambda: hf.ByT5Tokenizer(),
}
