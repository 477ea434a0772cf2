"""Structured logs on stderr, as text or JSON. They never contain prompt or completion text."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Literal

import orjson

_WARNINGS_LOGGER = "py.warnings"
"""Logger to which `logging.captureWarnings` sends Python warnings."""


class JsonFormatter(logging.Formatter):
    """Formats each record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, logger, message and exception as a JSON object."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def configure(level: str, style: Literal["text", "json"]) -> None:
    """Send the ``antares`` loggers and Python warnings to stderr.

    Loggers of libraries keep Python's default: warnings and errors only.
    """
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    for name in ("antares", _WARNINGS_LOGGER):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    warnings.formatwarning = _format_warning
    logging.captureWarnings(True)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning on one line: Python's own format adds a second line with the source code."""
    return f"{filename}:{lineno}: {category.__name__}: {message}"
