"""Converting pickled checkpoints to safetensors: `run` in the parent, `child` with limits."""
