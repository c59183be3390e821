"""Everything that prints: notes, plan, progress, results, errors."""

from merge_cli.console.screen import Screen, show_error

__all__ = ["Screen", "show_error"]
