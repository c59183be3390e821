"""Tokenizers of models: read, aligned to one vocabulary, joined, and chat templates."""
