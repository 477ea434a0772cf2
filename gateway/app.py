"""The gateway as one ASGI app: `/v1/*` goes to the proxy, every other path to the operator's routes."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from engine_adapter.engine import ASGIApp, Engine, EngineEvents, Receive, Scope, Send
from gateway import __version__
from gateway.api.auth import KeyRing
from gateway.api.connections import Connections, connections_for, descriptor_limit
from gateway.api.cors import Cors
from gateway.api.errors import method_not_allowed
from gateway.api.paths import API_PREFIX, unknown_path
from gateway.api.proxy import Proxy
from gateway.api.response_relay import send_error
from gateway.api.routes.table import RouteTable
from gateway.config.schema import GatewayConfig
from gateway.observability.ledger import Entry, Ledger
from gateway.observability.metrics import Metrics
from gateway.observability.status import Status
from gateway.policies.registry import make_policy
from gateway.prediction.client import LengthPredictor, LengthStatistics
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.retry_budget import RetryBudget
from gateway.scheduling.router import Router


class Gateway:
    """One gateway and its engines, as an ASGI app. Call `start` before the first request and `stop` after the last.

    ``predictor_url``: the length predictor service; None predicts from the running ``statistics`` only.
    """

    def __init__(
        self,
        config: GatewayConfig,
        engines: list[Engine],
        predictor_url: str | None = None,
        statistics: LengthStatistics | None = None,
    ) -> None:
        self._config = config
        self._calibrations: set[asyncio.Task[None]] = set()
        # The engine queues share this dict. A reload changes it in place.
        self._queued_classes = classes = config.slo_classes()
        self.metrics = Metrics()
        self.engine_queues = [
            EngineQueue(
                engine,
                make_policy(config.policy.name, dict(config.policy.options)),
                classes,
                on_decided=self.metrics.scheduling.labels(engine.name).observe,
                shadow=config.shadow_policies(),
            )
            for engine in engines
        ]
        for engine_queue in self.engine_queues:
            engine_queue.circuit.max_rest_s = config.failover.max_rest_s
        self.router = Router(self.engine_queues)
        self.ledger = Ledger(on_close=self._on_close)
        self.status = Status(self.engine_queues, self.ledger)
        self.predictor = LengthPredictor(
            predictor_url,
            config.predictor.timeout_ms / 1000,
            statistics or LengthStatistics(expected=config.predictor.expected_tokens),
        )
        self.metrics.watch(self.engine_queues, self.ledger)
        self.metrics.predictor_up.set_function(lambda: float(self.predictor.up))
        limits = config.limits.limits()
        self.connections = Connections(
            limits,
            connections_for(descriptor_limit(), config.engine_connections()),
            self.metrics.on_connection_closed,
        )
        self.proxy = Proxy(
            self.router,
            dict(classes),
            KeyRing(config.api_keys(), config.anonymous_key()),
            self.predictor,
            self.ledger,
            self.metrics,
            max_body_bytes=config.server.max_body_bytes,
            max_open_requests=config.server.max_open_requests,
            retries=RetryBudget(config.failover.retry_ratio, config.failover.min_retries_per_s),
            first_token_timeout_s=config.failover.first_token_timeout_s,
            max_pass_through=config.server.max_pass_through,
            routes=RouteTable(config.server.pass_through_routes),
            keep_alive_s=config.server.sse_keep_alive_s,
            guard=config.field_guard(),
            limits=limits,
        )
        self.metrics.watch_edge(self.connections, self.proxy.bodies)
        self._operator = _operator_routes(self)
        self._operator_paths = frozenset(route.path for route in self._operator.routes if isinstance(route, Route))
        self._api: ASGIApp = self._serve_api
        cors = config.server.cors
        if cors is not None:
            self._api = Cors(self._serve_api, cors.allow_origins, cors.allow_headers, cors.max_age_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        # NOTE: the operator's routes need no key, so pages of other origins must not read them.
        if scope["type"] == "http" and scope["path"] not in self._operator_paths:
            await self._api(scope, receive, send)
            return
        if scope.get("method") == "HEAD":
            # The server sends no body for HEAD.
            scope = {**scope, "method": "GET"}
        await self._operator(scope, receive, send)

    async def _serve_api(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(API_PREFIX):
            await self.proxy(scope, receive, send)
        else:
            await send_error(send, unknown_path(scope["path"]))

    async def start(self) -> None:
        """Start every engine and return when all can serve. Raises `engine_adapter.engine.EngineStartError`."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.predictor.warm_up())
            for engine_queue in self.engine_queues:
                group.create_task(engine_queue.engine.start(self.events_of(engine_queue)))

    def events_of(self, engine_queue: EngineQueue) -> EngineEvents:
        """Return what the engine of ``engine_queue`` reports to."""

        def on_alive(alive: bool) -> None:
            engine_queue.on_alive(alive)
            if alive:
                task = asyncio.create_task(
                    self.proxy.sizer.calibrate(engine_queue.engine), name="calibrate prompt sizes"
                )
                self._calibrations.add(task)
                task.add_done_callback(self._calibrations.discard)

        return EngineEvents(engine_queue.wake, on_alive, engine_queue.on_prefix_cache)

    def reload(self, config: GatewayConfig) -> list[str]:
        """Apply the keys, classes and guarded fields of ``config``, and return its changed keys that need a restart.

        Open requests keep the class and the rights that they were judged with. Nothing changes if this raises
        pydantic's ValidationError.
        """
        effective = self._config.reloaded(config)
        needs_restart = self._config.needs_restart(config)
        self._config = effective
        classes = effective.slo_classes()
        # A removed class stays in the queues, because open requests may belong to it.
        self._queued_classes.update(classes)
        self.proxy.classes = classes
        self.proxy.keys = KeyRing(effective.api_keys(), effective.anonymous_key())
        self.proxy.guard = effective.field_guard()
        return needs_restart

    async def drain(self, timeout_s: float) -> bool:
        """Reject new requests and wait for the open ones. Returns False if some are still open after ``timeout_s``."""
        self.proxy.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.proxy.in_flight:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stop the engines, the engine queues and the predictor client. Idempotent.

        Requests that are still open get 503 ``draining``, or an error event if their response has begun.
        """
        self.proxy.draining = self.proxy.stopping = True
        for task in self._calibrations:
            task.cancel()
        self.router.close()
        await self.predictor.close()
        await asyncio.gather(
            *(engine_queue.engine.stop() for engine_queue in self.engine_queues), return_exceptions=True
        )
        await self.proxy.cut()

    def _on_close(self, entry: Entry) -> None:
        self.metrics.on_close(entry)
        self.status.on_close(entry)


def _operator_routes(gateway: Gateway) -> FastAPI:
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
        if gateway.proxy.draining:
            return JSONResponse({"ready": False, "why": "draining"}, 503)
        if not gateway.router.alive:
            return JSONResponse({"ready": False, "why": "no engine is alive"}, 503)
        return JSONResponse({"ready": True})

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/status", summary="Current state as JSON")
    async def status() -> dict[str, Any]:
        return {**gateway.status.document(), "predictor_up": gateway.predictor.up}

    @app.get("/dashboard", response_class=HTMLResponse, summary="Current state as a page")
    async def dashboard() -> str:
        return files("gateway.observability").joinpath("dashboard.html").read_text(encoding="utf-8")

    return app
