"""GGUF, llama.cpp's file of one model: weights in blocks, config and vocabulary as key-value pairs.

    header      the file's keys and its table of tensors, every number held against bounds
    blocks      the layouts of blocks, and their numbers
    model       architectures: names, shapes, orders of rows, config.json
    tokenizer   tokenizer.json and its settings, from the vocabulary
    writing     the way back: keys, names and blocks
    vocabulary  the way back: a tokenizer's keys

Unlike the formats beside it, it is no layout within safetensors: `sources.gguf` opens such files.
"""
