"""Merging, evaluating and comparing several recipes (`merge-cli compare`)."""
