"""Structured logs on stderr, as text or JSON. They never contain prompt or completion text."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from types import TracebackType
from typing import Literal, TextIO

import orjson

_WARNINGS_LOGGER = "py.warnings"
"""Logger to which `logging.captureWarnings` sends Python warnings."""


_MAX_CHAIN = 8
"""Exceptions that are logged of one that others caused. They may refer to each other in a circle."""

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class TextFormatter(logging.Formatter):
    """Formats each record as text. NOTE: an exception's own text may quote a request, so only its frames are logged."""

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - the name is logging's
        """Return types and frames of the exception, then those of its causes."""
        parts: list[str] = []
        error = ei[1]
        while error is not None and len(parts) < _MAX_CHAIN:
            frames = "".join(traceback.format_tb(error.__traceback__))
            parts.append(f"{type(error).__name__}, raised in:\n{frames}".rstrip())
            error = error.__cause__ or error.__context__
        return "\ncaused by ".join(parts)


class JsonFormatter(TextFormatter):
    """Formats each record as one line of JSON. ``process``: see `configure`."""

    def __init__(self, process: int | None = None) -> None:
        super().__init__()
        self._place = {} if process is None else {"process": process}

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, logger, message and exception as a JSON object."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            **self._place,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Ignore that a line cannot be written. NOTE: Python's own would print the text of a logged exception."""


def configure(level: str, style: Literal["text", "json"], process: int | None = None) -> None:
    """Send the ``antares`` loggers and Python warnings to stderr.

    Loggers of libraries keep Python's default: warnings and errors only. ``process``: which of a gateway's processes
    this is; its lines say so.
    """
    handler = _Handler(sys.stderr)
    if style == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        place = "" if process is None else f"[{process}] "
        handler.setFormatter(TextFormatter(f"%(asctime)s %(levelname).1s {place}%(name)s: %(message)s", "%H:%M:%S"))
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
