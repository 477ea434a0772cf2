"""`POST /reload`: reads the configuration file again and answers what changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from gateway.api.auth import KeyRing
from gateway.api.errors import ApiError
from gateway.api.operator_auth import check_local, check_operator

Reload = Callable[[], Awaitable[dict[str, Any]]]
"""Reloads and returns a document with ``ok``, what changed, and the ``mistakes`` of the file."""


def add_reload_route(app: FastAPI, keys: Callable[[], KeyRing], reload: Reload) -> None:
    """Add the route to ``app``. ``keys`` returns the keys that count now."""

    @app.post("/reload", summary="Read the configuration file again, as SIGHUP does")
    async def reload_configuration(request: HttpRequest) -> Response:
        try:
            if keys().required:
                check_operator(request.headers, keys(), accept_basic=False)
            else:
                check_local(request)
        except ApiError as error:
            headers = {name.decode(): value.decode() for name, value in error.headers}
            return Response(error.body(), error.status, headers, "application/json")
        document = await reload()
        return JSONResponse(document, 200 if document["ok"] else 422)
