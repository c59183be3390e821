"""The files that describe a merge: report, HTML page, model card, and the charts of all pages."""
