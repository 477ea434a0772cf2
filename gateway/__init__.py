"""The Antares gateway: HTTP in, decisions, HTTP out."""

__version__ = "0.1.0"
