"""Trying methods one after the other, the cheap ones first, and keeping the best on data."""
