"""Output to the terminal: notes, plans, progress, results, errors."""

from merge_cli.console.plain import plain, print_json, print_text
from merge_cli.console.screen import Screen, show_error

__all__ = ["Screen", "plain", "print_json", "print_text", "show_error"]
