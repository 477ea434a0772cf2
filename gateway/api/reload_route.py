"""`POST /reload`: reads the configuration file again and answers what changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from gateway.api.addresses import is_loopback
from gateway.api.auth import KeyRing
from gateway.api.errors import ApiError
from gateway.api.operator_auth import not_an_operator

Reload = Callable[[], Awaitable[dict[str, Any]]]
"""Reloads and returns a document with ``ok``, what changed, and the ``mistakes`` of the file."""


def add_reload_route(app: FastAPI, keys: Callable[[], KeyRing], reload: Reload) -> None:
    """Add the route to ``app``. ``keys`` returns the keys that count now."""

    @app.post("/reload", summary="Read the configuration file again, as SIGHUP does")
    async def reload_configuration(request: HttpRequest) -> Response:
        try:
            check_operator(request, keys())
        except ApiError as error:
            headers = {name.decode(): value.decode() for name, value in error.headers}
            return Response(error.body(), error.status, headers, "application/json")
        document = await reload()
        return JSONResponse(document, 200 if document["ok"] else 422)


def check_operator(request: HttpRequest, keys: KeyRing) -> None:
    """Raise `ApiError` 401 or 403 unless the request has the key of an operator.

    Without any keys, it must come from this machine, and not from a web page that a browser shows there.
    """
    headers = request.headers
    key = keys.authenticate(headers.get("authorization"), headers.get("x-api-key"))
    if key.sha256:
        if not key.operator:
            raise not_an_operator("This API key has no `operator: true` in the configuration.")
    elif "origin" in headers or request.client is None or not is_loopback(request.client.host):
        raise not_an_operator(
            "Without keys, only programs on this machine may do this. Configure a key with operator: true."
        )
