"""Making LoRA adapters: extracted from a fine-tune, or merged from adapters (`output: adapter`)."""
