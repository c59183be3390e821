"""Converting models: `run` chooses.

run, child    pickles to safetensors, each in a process with limits
streamed      GGUF files and distributed checkpoints to safetensors, by the engine
gguf_file     models to GGUF files
"""
