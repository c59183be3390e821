"""The command line: each verb parses, calls the library, shows. A file for each family of verbs."""

from merge_cli.cli.app import app, main

__all__ = ["app", "main"]
