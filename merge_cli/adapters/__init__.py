"""Adapters that are made here: a fine-tune's change as LoRA factors, and adapters merged."""
