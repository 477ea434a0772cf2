"""The operator's routes: health, metrics, status, the dashboard and its live feed. They are not under ``/v1``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from gateway import __version__
from gateway.api.errors import method_not_allowed
from gateway.observability.dashboard import Page, dashboard_page
from gateway.observability.live import EVENTS_PATH, LiveFeed
from gateway.observability.metrics import Metrics
from gateway.observability.status import Status
from gateway.observability.wanted_replicas import WantedReplicas


def operator_routes(
    why_not_ready: Callable[[], str], metrics: Metrics, status: Status, live: LiveFeed, wanted: WantedReplicas
) -> FastAPI:
    """Return the app with the operator's routes. Each answers GET.

    ``why_not_ready`` returns why the gateway serves no requests now; "" if it does.
    """
    app = FastAPI(title="Antares", version=__version__, docs_url="/docs", redoc_url=None, redirect_slashes=False)

    @app.exception_handler(405)
    async def wrong_method(request: HttpRequest, error: HTTPException) -> Response:
        allowed = (error.headers or {}).get("Allow", "GET").replace("GET", "GET, HEAD")
        answer = method_not_allowed(request.method, request.url.path, allowed)
        return Response(answer.body(), answer.status, {"allow": allowed}, "application/json")

    @app.get("/health", response_class=PlainTextResponse, summary="Liveness: the gateway answers")
    async def health() -> str:
        return "ok"

    @app.get("/ready", summary="Readiness: an engine can serve and the gateway accepts requests")
    async def ready() -> Response:
        why = why_not_ready()
        return JSONResponse({"ready": False, "why": why}, 503) if why else JSONResponse({"ready": True})

    @app.get("/metrics", summary="Prometheus metrics")
    async def exposition(request: HttpRequest) -> Response:
        body, media_type = metrics.negotiated(request.headers.get("accept", ""))
        return Response(body, media_type=media_type)

    @app.get("/status", summary="Current state as JSON")
    async def state() -> dict[str, Any]:
        return status.document()

    @app.get("/replicas", summary="Engines that recent traffic needs, and why")
    async def replicas() -> dict[str, Any]:
        return wanted.document()

    @app.get("/dashboard", response_class=Page, summary="Current state as a page")
    async def dashboard() -> Response:
        return dashboard_page()

    @app.get(EVENTS_PATH, summary="Current state every second, as server-sent events")
    async def events() -> Response:
        return live.response()

    return app
