"""Pickled checkpoints to safetensors: `run` in the parent, `child` in a process of its own."""
