"""Comparing models before they are merged (`merge-cli analyze`): numbers, findings, advice."""
