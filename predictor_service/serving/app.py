"""HTTP routes of the predictor: ``POST /v1/predict``, ``POST /v1/observe``, ``GET /health``, ``GET /metrics``.

INVARIANT: no prompt appears in a response or a log. Bodies are validated by hand, because validation libraries quote
the input in their errors. An unexpected exception is logged by type and location only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from predictor_service.model.length_model import LengthPredictor
from predictor_service.serving.batching import Batcher, BatchLimits, DeadlinePassed, QueueFull
from predictor_service.serving.learning import Learning
from predictor_service.serving.metrics import PredictorMetrics
from predictor_service.serving.wire import (
    MAX_BODY_BYTES,
    BadRequest,
    Input,
    Predicted,
    parse_deadline,
    parse_observations,
    parse_request,
    render_error,
    render_health,
    render_observed,
    render_predictions,
)

log = logging.getLogger("antares.predictor")

DEADLINE_HEADER = "x-deadline-ms"
"""Header with the milliseconds after arrival at which the call fails with 504."""


def create_app(
    model: LengthPredictor,
    limits: BatchLimits | None = None,
    learning: Learning | None = None,
    known_models: frozenset[str] = frozenset(),
) -> Starlette:
    """Return the ASGI app that serves ``model``. Its lifespan starts and stops the batcher and ``learning``.

    If ``known_models`` is not empty, calls that name another served model are rejected with 404.
    """
    metrics, learning = PredictorMetrics(), learning or Learning()

    def compute(inputs: list[Input]) -> list[Predicted]:
        if model.reads_text:
            return learning.correct(inputs, model.predict([entry.prompt for entry in inputs]))
        features = [entry.to_features() for entry in inputs]
        return learning.correct(inputs, model.predict(features), features)

    batcher: Batcher[Input, Predicted] = Batcher(compute, limits, on_batch=metrics.batch_size.observe)
    metrics.queue_depth.set_function(lambda: batcher.waiting)
    metrics.watch(learning)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await batcher.start()
        await learning.start()
        yield
        await batcher.stop()
        await learning.stop()

    async def predict(request: Request) -> Response:
        started = time.perf_counter()

        async def respond() -> Response:
            timeout_s = parse_deadline(request.headers.get(DEADLINE_HEADER))
            inputs = parse_request(await _body(request), known_models, takes_features=not model.reads_text)
            if timeout_s is not None:
                timeout_s -= time.perf_counter() - started
            return _json(render_predictions(model.name, await batcher.submit(inputs, timeout_s)))

        response = await _or_error(respond)
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.latency.observe(time.perf_counter() - started)
        return response

    async def observe(request: Request) -> Response:
        async def respond() -> Response:
            observations = parse_observations(await _body(request), known_models)
            learning.observe(observations)
            return _json(render_observed(len(observations)), 202)

        return await _or_error(respond)

    async def health(request: Request) -> Response:
        return _json(render_health(model.name))

    async def render_metrics(request: Request) -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            Route("/v1/predict", predict, methods=["POST"]),
            Route("/v1/observe", observe, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", render_metrics),
        ],
        exception_handlers={HTTPException: _routing_error},
        lifespan=lifespan,
    )


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    body = render_error(str(error.detail), "invalid_request_error", code)
    return _json(body, error.status_code, dict(error.headers or {}))


async def _or_error(respond: Callable[[], Awaitable[Response]]) -> Response:
    """Return the response of ``respond``, or the error response for the exception that it raises."""
    try:
        return await respond()
    except BadRequest as error:
        return _json(render_error(error.message, "invalid_request_error", error.code, error.param), error.status)
    except QueueFull:
        body = render_error("Too many predictions are waiting (--max-waiting).", "overloaded_error", "queue_full")
        return _json(body, 503, {"retry-after": "1"})
    except DeadlinePassed:
        message = "The deadline passed before the prediction was ready."
        return _json(render_error(message, "timeout_error", "deadline_passed", DEADLINE_HEADER), 504)
    except Exception as error:  # log no message: it may quote a prompt
        log.error("a call failed: %s at %s", type(error).__name__, _location(error))
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


def _location(error: BaseException) -> str:
    """Return file and line at which ``error`` was raised."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "?" if frame is None else f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")
