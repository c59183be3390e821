"""Tiny models whose tokenizers differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.support.tiny import llama_config, llama_tensors, write_model

TEXTS = ["the cat sat on the mat", "a dog ran over the hill", "cats and dogs, hats and mats"]


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bpe(words: Sequence[str], size: int, special: Sequence[str] = ("<s>", "</s>")) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special),
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def write(
    folder: Path, tokenizer: Tokenizer, seed: int, *, rows: int | None = None, tied: bool = False,
    dtype: torch.dtype = torch.bfloat16, chat: str | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A tiny Llama with this tokenizer; `rows` more than it has are padding."""
    count = rows or tokenizer.get_vocab_size()
    generator = torch.Generator().manual_seed(seed)
    tensors = llama_tensors(generator, layers=1, width=8, vocabulary=count, tied=tied)
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    config = llama_config(layers=1, width=8, vocabulary=count, tied=tied)
    ids = {key: tokenizer.token_to_id(t) for key, t in (("bos", "<s>"), ("eos", "</s>"))}
    config |= {f"{key}_token_id": number for key, number in ids.items()}
    write_model(folder, tensors, config)
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = chat
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [ids["eos"], ids["bos"]], "temperature": 0.7}
    ))  # fmt: skip
    return tensors


def pair(folder: Path, **about: Any) -> tuple[Any, ...]:
    """base and chat: some tokens shared, with other numbers; two special ones of chat alone."""
    a = bpe(TEXTS[:2], 60)
    b = bpe(TEXTS[1:], 70, ("<pad>", "<s>", "</s>"))
    b.add_special_tokens([AddedToken("<|im_start|>", special=True), "<|im_end|>"])
    one = write(folder / "base", a, 1, **about)
    two = write(folder / "chat", b, 2, **about)
    return a, b, one, two
