"""torch's distributed checkpoints (DCP): what FSDP, torchtitan and OLMo-core save while they train.

    inert       pickles read as data: nothing that they name is imported or called
    metadata    `.metadata`: every tensor, its parts, and where in which file they lie
    storage     a part within a `.distcp` file, down to its first byte
    model       the model's tensors, put together from their parts; optimizer states are left out

`sources.dcp` opens such folders.
"""
