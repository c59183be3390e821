"""Pushing a merged model to the Hugging Face Hub (`merge-cli push`)."""
