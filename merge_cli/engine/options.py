"""The old home of `merge_cli.options`."""

from merge_cli.options import DEFAULT_MEMORY, MergeOptions, OnProgress, Progress

__all__ = ["DEFAULT_MEMORY", "MergeOptions", "OnProgress", "Progress"]
