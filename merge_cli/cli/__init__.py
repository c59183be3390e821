"""The command line: a file for each command, which parses, calls the library, and prints."""

from merge_cli.cli.app import app, main

__all__ = ["app", "main"]
