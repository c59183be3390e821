"""LoRA adapters: opened, checked, and applied to a model's tensors while these are read."""
