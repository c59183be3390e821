"""How text is cut before merges: what the words in GGUF files mean.

For a word that is not here no tokenizer is written, rather than one that cuts numbers or words
otherwise than the model's.
"""

from __future__ import annotations

from dataclasses import dataclass

# What text is cut into before merges, as the models' own tokenizer.json have it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut.

    Attributes:
        pattern: the expression of the cuts; empty for GPT-2's.
        single_digits: whether numbers are cut into digits before.
        whole_words: whether a word that is a token is taken whole, whatever its merges.
        adds_bos: whether text begins with a token of its own where the file does not say.
        normalizer: the form of Unicode that text is brought to.
    """

    pattern: str = ""
    single_digits: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    normalizer: str = ""


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(single_digits=True)
_LLAMA = PreTokenizer(_LLAMA3, whole_words=True, adds_bos=True)
_QWEN = PreTokenizer(_QWEN2, normalizer="NFC")
# The words of files, which llama.cpp's llama-vocab.cpp lists.
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "phi-2", "roberta-bpe", "mpt", "olmo", "jais"), _GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN),
    "stablelm2": PreTokenizer(_QWEN2),
    "tekken": PreTokenizer(_TEKKEN, whole_words=True, adds_bos=True),
}
