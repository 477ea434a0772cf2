"""The live feed behind the dashboard and `antares top`: one snapshot a second over server-sent events.

A snapshot is computed once for all viewers, and only while there are any. There is no queue per viewer: each gets the
newest snapshot when it has taken the one before, so a slow viewer skips some. A new viewer first gets the history of
the last minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from typing import Any

import numpy as np
import orjson
from starlette.responses import JSONResponse, Response

from engine_adapter.engine import EngineState, Receive, Scope, Send
from engine_adapter.step_time.curve import KNOTS
from gateway.observability.decisions import to_ms
from gateway.observability.status import Finished, Status

log = logging.getLogger("antares.live")

EVENTS_PATH = "/dashboard/events"

HEADERS_ONLY_KEY = "antares.headers_only"
"""Key of an ASGI scope, true if only the headers of the response are sent (HEAD)."""

INTERVAL_S = 1.0
"""Time between two snapshots in seconds."""

HISTORY_S, HISTORY_STEP = 900, 3
"""Length of the history in seconds, and snapshots per sample of it: 300 samples fill a chart."""

MAX_VIEWERS = 32
"""Viewers at a time. A viewer costs about 20 kB/s."""

SEND_TIMEOUT_S = 20.0
"""Time in seconds after which a viewer that takes nothing is disconnected."""

MAX_CLASSES, MAX_ENGINES = 32, 16
"""SLO classes and engines in the history, and engines whose step-time model a snapshot shows."""

_POINTS, _POINTS_IN_HISTORY = 20, 300
"""Finished requests of one snapshot, and of the history: predicted and achieved latencies."""

_STEPS = 60
"""Latest steps of each kind that show the error of the step-time model."""

_CONTEXTS = (256, 1024, 4096)
"""Tokens of context per sequence for which the step-time curve is drawn."""


class LiveFeed:
    """Computes the snapshots and sends them to the viewers."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._samples: deque[list[Any]] = deque(maxlen=HISTORY_S // HISTORY_STEP)
        self._points: deque[list[Any]] = deque(maxlen=_POINTS_IN_HISTORY)
        self._points_until = 0.0
        self._viewers = 0
        self._ticks = 0
        self._snapshot = b""
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._admitted = 0

    def start(self) -> None:
        """Start to record the history. Idempotent."""
        if self._task is None and not self._stopped:
            self._task = asyncio.create_task(self._run(), name="live feed")

    async def stop(self) -> None:
        """End the feed and the streams of all viewers. Idempotent."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        async with self._changed:
            self._changed.notify_all()

    def readmit(self) -> None:
        """End the streams of all viewers within a second. They connect again, if their keys still count."""
        self._admitted += 1

    def response(self) -> Response:
        """Return the event stream for a new viewer, or 503 if there are too many."""
        if self._viewers >= MAX_VIEWERS or self._stopped:
            message = (
                "The gateway stops." if self._stopped else f"{MAX_VIEWERS} viewers are connected; try again later."
            )
            return JSONResponse({"error": {"message": message}}, 503, {"retry-after": "5"})
        return _EventStream(self)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            try:
                await self._tick()
            except Exception as error:
                # The dashboard is no reason to end anything, and the next tick may succeed.
                log.error("live feed failed: %s", type(error).__name__, exc_info=error)
            due = max(due + INTERVAL_S, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _tick(self) -> None:
        at = round(time.time(), 1)
        since, self._points_until = self._points_until, time.monotonic()
        finished = self._status.finished_since(since, _POINTS)
        points = [_point(request, self._points_until, at) for request in finished]
        self._points.extend(points)
        if self._ticks % HISTORY_STEP == 0:
            self._samples.append(self._sample(at))
        self._ticks += 1
        if self._viewers:
            self._snapshot = _event("snapshot", self._document(at, points))
            async with self._changed:
                self._changed.notify_all()

    def _sample(self, at: float) -> list[Any]:
        """Return what the history keeps of this moment: time, then by class and by engine a few numbers."""
        queues = self._status.engine_queues
        rates = self._status.windows.classes("1m")
        running = Counter(request.slo_class for queue in queues for request in queue.running.values())
        waiting: Counter[str] = Counter()
        for queue in queues:
            waiting.update(queue.waiting.by_class)
        classes = {}
        for name in list(queues[0].classes)[:MAX_CLASSES]:
            of_class = rates.get(name, {})
            classes[name] = [
                of_class.get("adherence"),
                of_class.get("goodput_per_s", 0.0),
                of_class.get("arrived_per_s", 0.0),
                waiting[name],
                running[name],
            ]
        engines = {queue.engine.name: [len(queue.waiting), len(queue.running)] for queue in queues[:MAX_ENGINES]}
        return [at, classes, engines]

    def _document(self, at: float, points: list[list[Any]]) -> dict[str, Any]:
        queues = self._status.engine_queues
        return {
            "at": at,
            **self._status.document(),
            "sample": self._sample(at),
            "points": points,
            "step_times": {queue.engine.name: _step_times(queue.engine.state) for queue in queues[:MAX_ENGINES]},
        }

    def history(self) -> bytes:
        """Return the event with the samples and points of the last minutes."""
        return _event("history", {"samples": list(self._samples), "points": list(self._points)})

    async def send(self, send: Send) -> None:
        """Send the history and then the snapshots until the feed ends. Raises `TimeoutError` for a stalled viewer."""
        self.start()
        self._viewers += 1
        admitted = self._admitted
        try:
            await _send(send, b"retry: 2000\n\n" + self.history())
            while await self._next() and admitted == self._admitted:
                await _send(send, self._snapshot)
        finally:
            self._viewers -= 1

    async def _next(self) -> bool:
        """Return True once there is a new snapshot, False if the feed ended."""
        async with self._changed:
            if not self._stopped:
                await self._changed.wait()
        return not self._stopped


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(self, feed: LiveFeed) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if not scope.get(HEADERS_ONLY_KEY):
            sending = asyncio.ensure_future(self._feed.send(send))
            leaving = asyncio.ensure_future(_left(receive))
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await _send(send, b"", more=False)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, body: bytes, more: bool = True) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": body, "more_body": more})


def _event(name: str, document: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(document) + b"\n\n"


def _point(request: Finished, now: float, at: float) -> list[Any]:
    """Return wall time, class, predicted and achieved TTFT, planned pace, achieved TPOT (ms), and if it attained."""
    return [
        round(at - (now - request.at), 1),
        request.slo_class,
        to_ms(request.predicted_ttft_s, 2),
        to_ms(request.ttft_s, 2),
        to_ms(request.pace_s, 2),
        to_ms(request.tpot_s, 2),
        request.attained,
    ]


def _step_times(state: EngineState) -> dict[str, Any]:
    """Return the step-time model of an engine: coefficients, quality, curves and its latest steps. Times in ms."""
    model = state.step_time
    batches = KNOTS[(KNOTS > 0) & (state.max_num_seqs > KNOTS)].tolist()
    batches.append(float(state.max_num_seqs))
    curves = []
    for context in _CONTEXTS:
        # A batch beyond the engine's KV memory never runs.
        held = [batch for batch in batches if not state.kv_tokens or batch * context <= state.kv_tokens]
        if context <= state.max_model_len and len(held) > 1:
            sizes = np.asarray(held)
            seconds = model.curve.steps_s(sizes, sizes * context)
            points = [[batch, to_ms(second, 2)] for batch, second in zip(held, seconds.tolist(), strict=True)]
            curves.append({"context": context, "points": points})
    steps = model.latest(_STEPS)
    predicted = [model.curve.step_s(decodes, decodes * context, prefill) for decodes, context, prefill, _ in steps]
    quality = model.curve_quality
    return {
        "steps_seen": model.steps_seen,
        "coefficients_ms": {name: getattr(model.times, name) * 1000 for name in ("a", "b", "c", "d", "alpha", "beta")},
        "quality": quality and {"r2": round(quality.r2, 3), "rmse_ms": to_ms(quality.rmse_s, 2), "mape": quality.mape},
        "curves": curves,
        "steps": [
            [decodes, round(context), prefill, to_ms(seconds, 2), to_ms(seconds_predicted, 2)]
            for (decodes, context, prefill, seconds), seconds_predicted in zip(steps, predicted, strict=True)
        ],
    }
