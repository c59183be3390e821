"""Trains the family's tokenizer: byte-level BPE, digits one by one, one special token."""

import random
from collections.abc import Iterator
from pathlib import Path

from corpora import read_rows
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SEED = 20240613
VOCABULARY = 4096
POSITIONS = 512
END = "<|endoftext|>"
# Bytes of text per domain. English is over half of what the base reads, arithmetic is easy.
SAMPLE = {
    "english": 3_000_000,
    "japanese": 2_500_000,
    "german": 1_500_000,
    "code": 2_500_000,
    "math": 200_000,
}


def _sample(corpora: Path) -> Iterator[str]:
    rng = random.Random(SEED)
    for domain, size in SAMPLE.items():
        rows = read_rows(corpora / f"{domain}.train.jsonl")
        rng.shuffle(rows)
        for row in rows:
            text = row["text"] if "text" in row else row["prompt"] + row["completion"]
            size -= len(text.encode())
            if size < 0:
                break
            yield text


def build(work: Path) -> None:
    """Writes WORK/tokenizer as AutoTokenizer loads it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(work / "corpora"), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(work / "tokenizer"))
