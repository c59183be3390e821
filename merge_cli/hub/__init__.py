"""Models on the Hugging Face Hub: opened, downloaded, and the Hub's errors as messages."""
