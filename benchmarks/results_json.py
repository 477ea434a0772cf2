"""Writes the JSON files of docs/results with one record per line, so that a diff shows which records changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INDENT = "  "


def read(path: Path | None) -> dict[str, Any]:
    """Return the document that a stopped study left in ``path``; empty if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}


def write(document: Mapping[str, Any], path: Path | None) -> None:
    """Write ``document`` to ``path`` in the layout of `dumps`; nothing without a path."""
    if path is not None:
        path.write_text(dumps(document), encoding="utf-8")


def dumps(document: Mapping[str, Any]) -> str:
    """``document`` as JSON text: one member per line, and one line per object in a list of objects.

    A value that contains no list of objects stays on one line. Any other value is expanded in the same way.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    return _expanded(document, "") + "\n"


def _expanded(value: Any, indent: str) -> str:
    """``value`` over several lines, the last of them at ``indent``."""
    deeper = indent + _INDENT
    if isinstance(value, Mapping):
        lines = [f"{deeper}{_compact(key)}: {_text(member, deeper)}" for key, member in value.items()]
        start, end = "{", "}"
    else:
        lines = [deeper + _text(record, deeper) for record in value]
        start, end = "[", "]"
    return start + "\n" + ",\n".join(lines) + "\n" + indent + end


def _text(value: Any, indent: str) -> str:
    return _expanded(value, indent) if _has_records(value) else _compact(value)


def _has_records(value: Any) -> bool:
    """Whether ``value`` is or contains a list of objects."""
    if isinstance(value, Mapping):
        return any(_has_records(member) for member in value.values())
    if isinstance(value, list | tuple):
        return any(isinstance(element, Mapping) or _has_records(element) for element in value)
    return False


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
