"""Counts the output tokens of a response. One module per API."""
