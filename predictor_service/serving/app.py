"""The predictor's HTTP face: ``POST /v1/predict``, ``POST /v1/observe``, ``GET /health``, ``GET /metrics``.

Nothing of a prompt leaves through here: bodies are parsed by hand (no validation error echoes them), and an
unexpected exception is logged by its type and place only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from predictor_service.model.length_model import LengthPredictor
from predictor_service.serving.batching import Batcher, BatchLimits, DeadlinePassed, QueueFull
from predictor_service.serving.learning import Learning
from predictor_service.serving.metrics import PredictorMetrics
from predictor_service.serving.wire import (
    MAX_BODY_BYTES,
    BadRequest,
    Input,
    Predicted,
    parse_deadline_ms,
    parse_observations,
    parse_request,
    render_error,
    render_health,
    render_observed,
    render_predictions,
)

log = logging.getLogger("antares.predictor")

DEADLINE_HEADER = "x-deadline-ms"
"""Milliseconds, counted from the call's arrival, after which its answer is of no use: 504 instead."""


def create_app(
    model: LengthPredictor,
    limits: BatchLimits | None = None,
    learning: Learning | None = None,
    known_models: frozenset[str] = frozenset(),
) -> FastAPI:
    """The ASGI app that serves ``model``. Its lifespan starts and stops the batcher and ``learning``.

    With ``known_models``, requests that name another served model are refused.
    """
    metrics, learning = PredictorMetrics(), learning or Learning()

    def compute(inputs: list[Input]) -> list[Predicted]:
        if model.reads_text:
            raw = model.predict([one.prompt for one in inputs])
            return learning.served(inputs, raw)
        features = [one.to_features() for one in inputs]
        return learning.served(inputs, model.predict(features), features)

    batcher: Batcher[Input, Predicted] = Batcher(compute, limits, on_batch=metrics.batch_size.observe)
    metrics.queue_depth.set_function(lambda: batcher.waiting)
    metrics.watch(learning)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await batcher.start()
        await learning.start()
        yield
        await batcher.stop()
        await learning.stop()

    app = FastAPI(title="Antares output-length predictor", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.openapi_url = None

    @app.post("/v1/predict")
    async def predict(request: Request) -> Response:
        began = time.perf_counter()

        async def answer() -> Response:
            timeout_s = parse_deadline_ms(request.headers.get(DEADLINE_HEADER))
            inputs = parse_request(await _body(request), known_models, takes_features=not model.reads_text)
            if timeout_s is not None:
                timeout_s -= time.perf_counter() - began
            return _json(render_predictions(model.name, await batcher.submit(inputs, timeout_s)))

        response = await _or_error(answer)
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.latency.observe(time.perf_counter() - began)
        return response

    @app.post("/v1/observe")
    async def observe(request: Request) -> Response:
        async def answer() -> Response:
            observations = parse_observations(await _body(request), known_models)
            learning.observe(observations)
            return _json(render_observed(len(observations)), 202)

        return await _or_error(answer)

    @app.get("/health")
    async def health() -> Response:
        return _json(render_health(model.name))

    @app.get("/metrics")
    async def render_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        body = render_error(str(error.detail), "invalid_request_error", code)
        return _json(body, error.status_code, dict(error.headers or {}))

    return app


async def _or_error(answer: Callable[[], Awaitable[Response]]) -> Response:
    """What ``answer`` answers; every way it can go wrong has its status here."""
    try:
        return await answer()
    except BadRequest as wrong:
        return _json(render_error(wrong.message, "invalid_request_error", wrong.code, wrong.param), wrong.status)
    except QueueFull:
        body = render_error("Too many predictions are waiting.", "overloaded_error", "queue_full")
        return _json(body, 503, {"retry-after": "1"})
    except DeadlinePassed:
        message = "The deadline passed before the prediction was ready."
        return _json(render_error(message, "timeout_error", "deadline_passed", DEADLINE_HEADER), 504)
    except Exception as error:  # its message may quote a prompt: type and place only
        log.error("a call failed: %s at %s", type(error).__name__, _place(error))
        return _json(render_error("The call failed.", "server_error", "internal_error"), 500)


async def _body(request: Request) -> bytes:
    too_large = BadRequest(f"The body may hold at most {MAX_BODY_BYTES} bytes.", status=413, code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def _place(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "?" if frame is None else f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")
