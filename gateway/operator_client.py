"""Calls the operator's routes of a running gateway, and finds the API key that the commands send."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from typing import Any

from engine_adapter.key_variable import key_in

KEY_VARIABLES = ("ANTARES_OPERATOR_KEY", "ANTARES_API_KEY", "ANTARES_KEY")
"""Environment variables that may hold the key, in this order. The last one is that of version 0.1."""


UNREACHABLE_HINT = "Start the gateway, or set --url to its address."
"""What to do if no gateway answers. Every command that calls one has the option."""


class Unreachable(Exception):  # noqa: N818 - named after its cause
    """The gateway gave no answer; the message says why."""


class NoKeyError(Exception):
    """The environment variable for the key is not set, or holds no key."""


def key_from(variable: str | None) -> str | None:
    """Return the API key in the environment ``variable``, or in the first one of `KEY_VARIABLES`; None without one.

    Raises `NoKeyError` if ``variable`` is named but not set, or if a value is no key.
    """
    for name in KEY_VARIABLES if variable is None else (variable,):
        try:
            key = key_in(name)
        except ValueError as error:
            raise NoKeyError(str(error)) from None
        if key:
            return key
    if variable is not None:
        raise NoKeyError(f"the environment variable {variable} is not set")
    return None


def call(method: str, url: str, timeout_s: float, key: str | None = None) -> tuple[int, Any]:
    """Return status and JSON document (None if it is none) of the answer of a gateway. Raises `Unreachable`."""
    headers = {"accept": "application/json"}
    if key:
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
        raise Unreachable(f"no answer from {url}: {reason or type(error).__name__}. {UNREACHABLE_HINT}") from error


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
