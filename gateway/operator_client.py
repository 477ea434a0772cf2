"""Calls the operator's routes of a running gateway: `antares health` and `antares config reload`."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from typing import Any

KEY_VARIABLE = "ANTARES_OPERATOR_KEY"
"""Environment variable with the key of an operator."""


class Unreachable(Exception):  # noqa: N818 - named after its cause
    """The gateway gave no answer; the message says why."""


def call(method: str, url: str, timeout_s: float) -> tuple[int, Any]:
    """Return status and JSON document (None if it is none) of the answer of a gateway. Raises `Unreachable`."""
    headers = {"accept": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["authorization"] = f"Bearer {key}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, method=method, headers=headers), timeout=timeout_s) as answer:
            return answer.status, _document(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _document(error.read())
    except (OSError, ValueError, http.client.HTTPException, ssl.SSLError) as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(f"no answer from {url}: {reason or type(error).__name__}") from error


def reload_lines(document: dict[str, Any]) -> list[str]:
    """Return the report of a reload as text."""
    if not document["ok"]:
        file = document.get("file") or "configuration"
        return [
            "nothing changed:",
            *(f"{file}: line {m['line']}: {m['key']}: {m['reason']}" for m in document["mistakes"]),
        ]
    lists = (
        ("changed", "changed"),
        ("needs_restart", "needs a restart"),
        ("starting", "starting"),
        ("leaving", "leaving"),
    )
    lines = [f"{label}: {', '.join(document[name])}" for name, label in lists if document[name]]
    return lines or ["nothing changed"]


def _document(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
