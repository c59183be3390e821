"""torch's distributed checkpoints (DCP): what FSDP, torchtitan and OLMo-core save while they train.

    metadata    `.metadata`: every tensor, its parts, and where in which file they lie
    storage     a part within a `.distcp` file, down to its first byte
    model       the model's tensors, put together from their parts; optimizer states are left out
    names       Megatron's and other programs' names as Hugging Face's, as names.yaml says

Pickles are read as data (`formats.inert`, `formats.torch_files`).
"""
