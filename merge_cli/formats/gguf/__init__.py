"""GGUF, llama.cpp's file of one model: weights in blocks, config and vocabulary as key-value pairs.

    header      the file's keys and its table of tensors, every number held against bounds
    blocks      types of blocks, and tensors of them; block_decoders: what is in a block
    architectures  names and shapes of tensors, here and there
    config      config.json, from the keys
    model       a file's tensors as Hugging Face has them
    tokenizer   tokenizer.json and its settings, from the vocabulary
    writing     the way back: keys, names and blocks
    vocabulary  the way back: a tokenizer's keys

Unlike the formats beside it, it is no layout within safetensors: `sources.gguf` opens such files.
"""
