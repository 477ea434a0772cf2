"""The Antares gateway: HTTP API, scheduling and admission of requests."""

__version__ = "0.1.0"
