"""A comparison written down: JSON, Markdown, CSV, one HTML page."""
