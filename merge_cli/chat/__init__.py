"""`merge-cli chat`: talk to a model, or to two side by side; answer a file of prompts."""
