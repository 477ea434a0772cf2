"""Predict output lengths through the predictor service, with a timeout and a fallback.

The service is optional. If it does not respond in time, the prediction comes from recent output lengths of the
request's class. Actual lengths go to these statistics and, if the service made the prediction, to the service.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import orjson

from engine_adapter.asgi import cancel_and_wait
from engine_adapter.engine import EngineLost
from engine_adapter.remote.client import Upstream
from gateway.prediction.circuit_breaker import CircuitBreaker
from gateway.prediction.lengths import LengthStatistics, Prediction, within
from gateway.prediction.reports import LengthReport, LengthReports, UnreachableError

log = logging.getLogger("antares.prediction")

HEAD_CHARS, TAIL_CHARS = 15_360, 1024
"""Characters sent from the start and the end of a longer prompt. The predictor reads fewer characters than these, and
its length features do not distinguish longer prompts."""

LATER_S = 0.05
"""Seconds after which a question is asked that no request waits for: a request that ends before needs no answer. It is
asked at most as much later, with the others. Convention: a few steps of an engine."""

PROBE_S = 1.0
"""Seconds between probes of a service whose circuit breaker is open. The breaker's own pause is as long."""

HINT_P90 = 1.25
"""Ratio of the p90 to a length that a client states. Convention: a client knows its length better than a predictor,
whose p90 is about twice its p50."""


class Question(NamedTuple):
    """What the service is asked about one request: the output tokens of one sequence of ``model``.

    The prediction is at most ``max_tokens`` and at least ``min_tokens``.
    """

    prompt: str
    prompt_tokens: int
    slo_class: str
    max_tokens: int | None
    min_tokens: int = 0
    model: str = ""
    request_id: str | None = None

    def within(self, prediction: Prediction) -> Prediction:
        """Return ``prediction`` between the request's limits."""
        return within(prediction, self.max_tokens, self.min_tokens)


@dataclass(slots=True)
class _Pending:
    """One input of the service, and its prediction (None: failed)."""

    document: dict[str, object]
    answer: asyncio.Future[Prediction | None]


class _Later(NamedTuple):
    """A question for which no request waits. ``wanted`` says whether its answer can still be used."""

    wanted: Callable[[], bool]
    on_answer: Callable[[Prediction | None], None]
    question: Question


class LengthPredictor:
    """Client of the predictor service. With ``url`` None it uses only the fallback.

    A request waits at most ``timeout_s`` seconds. Failures open a circuit breaker, so that requests do not wait for a
    dead predictor. While it is open, one task probes the service, so an idle gateway notices the recovery too.
    There is one call at a time: questions that arrive during a call form the batch of the next one. Questions for which
    no request waits are asked after `LATER_S`, for the requests that have not ended.
    """

    def __init__(self, url: str | None, timeout_s: float, statistics: LengthStatistics) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self._statistics = statistics
        self._breaker = CircuitBreaker()
        self._client: Upstream | None = None
        self.reports = LengthReports(self._post_reports)
        """Actual lengths to send to the service."""
        self._pending: deque[_Pending] = deque()
        self._later: list[_Later] = []
        self._due: list[_Later] = []
        """Those of ``_later`` that the timer's next end is for."""
        self._later_timer: asyncio.TimerHandle | None = None
        self._sender: asyncio.Task[None] | None = None
        self._prober: asyncio.Task[None] | None = None
        self._calls = 0
        self._rejections = 0
        self._failed_call = -1
        """Number of the latest call that counted as failed."""

    @property
    def up(self) -> bool:
        """Whether the service responds: the breaker is closed and no call is late."""
        return self.url is not None and self._breaker.closed and not self._late

    @property
    def _late(self) -> bool:
        """Whether a request has timed out on the current call."""
        return self._sender is not None and not self._sender.done() and self._failed_call == self._calls

    async def predict(self, question: Question) -> Prediction:
        """Predict the output tokens of one sequence, within the timeout. Never raises.

        The prediction is at most ``max_tokens`` and at least ``min_tokens`` and 1.
        """
        prediction = None
        if self.url is not None and self._breaker.allows():
            pending = self._ask(question)
            prediction = await self._answer(pending) if pending is not None else None
        return question.within(prediction or self._statistics.predict(question.slo_class))

    def usual(self, question: Question) -> Prediction:
        """Return what the recent lengths of the class predict, without asking the service."""
        return question.within(self._statistics.predict(question.slo_class))

    def predict_later(
        self, question: Question, wanted: Callable[[], bool], on_answer: Callable[[Prediction | None], None]
    ) -> None:
        """Ask the service soon, and call ``on_answer`` once with its prediction; with None if it makes none.

        ``wanted`` is called before. If it returns False, the service is not asked.
        """
        if self.url is None or len(self._later) + len(self._due) + len(self._pending) >= _MAX_PENDING:
            on_answer(None)
            return
        self._later.append(_Later(wanted, on_answer, question))
        if self._later_timer is None:
            self._later_timer = asyncio.get_running_loop().call_later(LATER_S, self._ask_later)

    def _ask_later(self) -> None:
        due, self._due, self._later, self._later_timer = self._due, self._later, [], None
        if self._due:
            self._later_timer = asyncio.get_running_loop().call_later(LATER_S, self._ask_later)
        for one in due:
            pending = self._ask(one.question) if one.wanted() and self._breaker.allows() else None
            if pending is None:
                one.on_answer(None)
            else:
                pending.answer.add_done_callback(partial(_answer_later, one))

    def from_hint(self, hint: int, slo_class: str, limit: float, min_tokens: int = 0) -> Prediction:
        """Return the prediction for a client that expects ``hint`` output tokens per sequence.

        It is at most ``limit`` and at least ``min_tokens`` and 1. An output that becomes longer than the hint's p90
        proves the hint wrong, so the recent lengths of the class count from there on.
        """
        usual = self._statistics.predict(slo_class)
        least = max(1.0, min_tokens)
        return Prediction(
            tokens=max(least, min(hint, limit)),
            p90=max(least, min(hint * HINT_P90, limit)),
            source="hint",
            beyond=(usual.tokens, max(usual.p90, 2 * usual.tokens)),
        )

    async def warm_up(self, max_wait_s: float = 5.0) -> bool:
        """Wait until the service responds, so that no request waits for its slow first call.

        False on timeout: then the breaker is open until the service responds.
        """
        if self.url is None:
            return False
        deadline, why = time.monotonic() + max_wait_s, ""
        while time.monotonic() < deadline:
            try:
                await self._post([_PROBE])
            except (_CallFailedError, _RejectedError) as error:
                why = str(error)
            else:
                self._breaker.record(True)
                return True
            await asyncio.sleep(0.2)
        while self._breaker.closed:
            self._breaker.record(False)
        self._on_open(why)
        return False

    def observe(self, slo_class: str, tokens: int) -> None:
        """Add the output length of a finished request to the fallback statistics."""
        self._statistics.observe(slo_class, tokens)

    def report(
        self, prediction: Prediction, request_id: str, model: str, slo_class: str, tokens: int, censored: bool
    ) -> None:
        """Queue the actual length of a finished request for the service. Does nothing for fallback predictions.

        ``censored``: a token limit ended the output.
        """
        if prediction.raw is not None:
            names = _name(model), _name(slo_class)
            self.reports.add(LengthReport(request_id, *names, *prediction.raw, tokens, censored))

    async def close(self) -> None:
        """Stop the background tasks and close the connection."""
        if self._later_timer is not None:
            self._later_timer.cancel()
        await self.reports.close()
        for task in (self._sender, self._prober):
            if task is not None:
                await cancel_and_wait(task)
        self._sender = self._prober = None
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _ask(self, question: Question) -> _Pending | None:
        """Put a question into the next call; None if a call is late, after which that one would start."""
        if self._late:
            return None
        # The service rejects a whole batch for one invalid limit, so leave that limit out.
        limit = question.max_tokens
        document = {
            "prompt": _shortened(question.prompt),
            "prompt_tokens": question.prompt_tokens,
            "max_tokens": limit if limit is not None and 1 <= limit <= _MAX_TOKENS else None,
            "model": _name(question.model),
            "slo_class": _name(question.slo_class),
            "id": question.request_id,
        }
        pending = _Pending(document, asyncio.get_running_loop().create_future())
        self._pending.append(pending)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="call the predictor")
        return pending

    async def _answer(self, pending: _Pending) -> Prediction | None:
        """Return the service's prediction, or None on failure or timeout."""
        await asyncio.wait({pending.answer}, timeout=self.timeout_s)
        if not pending.answer.done():
            pending.answer.cancel()
            self._count_failure(f"no answer within {1000 * self.timeout_s:g} ms")
            return None
        return pending.answer.result()

    def _count_failure(self, why: str) -> None:
        """Count the current call as failed, at most once."""
        if self._failed_call != self._calls:
            self._failed_call = self._calls
            self._breaker.record(False)
            if not self._breaker.closed:
                self._on_open(why)

    def _on_open(self, why: str) -> None:
        """Probe the service until it responds."""
        if self._prober is None or self._prober.done():
            log.warning("the predictor at %s does not respond: %s; recent lengths are the predictions", self.url, why)
            self._prober = asyncio.create_task(self._probe(), name="probe the predictor")

    async def _probe(self) -> None:
        """Call the service every `PROBE_S` seconds until the breaker is closed, by a probe or by a request."""
        while not self._breaker.closed:
            await asyncio.sleep(PROBE_S)
            if not self._breaker.closed and self._breaker.allows():
                try:
                    await self._post([_PROBE])
                except (_CallFailedError, _RejectedError):
                    self._breaker.record(False)
                else:
                    self._breaker.record(True)
        log.info("the predictor at %s responds again", self.url)

    async def _send(self) -> None:
        # A request's timeout does not cancel the call, which has other questions too. It ends by its own timeout.
        while self._pending:
            batch = [self._pending.popleft() for _ in range(min(len(self._pending), _MAX_BATCH))]
            batch = [pending for pending in batch if not pending.answer.done()]
            if not batch:
                continue
            answers: list[Prediction | None] = [None] * len(batch)
            self._calls += 1
            try:
                answers = [*await self._post([pending.document for pending in batch])]
                self._rejections = 0
            except _RejectedError as error:
                # One input may be at fault, but not every input.
                self._rejections += 1
                if self._rejections >= _MAX_REJECTIONS:
                    self._count_failure(str(error))
            except _CallFailedError as error:
                self._count_failure(str(error))
            if self._failed_call != self._calls:
                self._breaker.record(True)
            for pending, answer in zip(batch, answers, strict=True):
                if not pending.answer.done():
                    pending.answer.set_result(answer)

    async def _post(self, questions: list[dict[str, object]]) -> list[Prediction]:
        try:
            status, body = await self._call(b"/v1/predict", {"inputs": questions})
            if status in (400, 413, 422):
                raise _RejectedError(f"it returned {status}")
            if status != 200:
                raise _CallFailedError(f"it returned {status}")
            predictions = [_read(answer) for answer in orjson.loads(body)["predictions"]]
        except EngineLost as error:
            raise _CallFailedError(str(error)) from error
        except TimeoutError as error:
            raise _CallFailedError(f"no answer within {_CALL_TIMEOUT_S:g} s") from error
        except (ValueError, LookupError, TypeError) as error:
            raise _CallFailedError("its answer has no predictions") from error
        if len(predictions) != len(questions) or not all(math.isfinite(p.tokens + p.p90) for p in predictions):
            raise _CallFailedError("its answer has no predictions")
        return predictions

    async def _post_reports(self, reports: list[LengthReport]) -> None:
        try:
            status, _ = await self._call(b"/v1/observe", {"observations": reports})
        except (EngineLost, TimeoutError, ValueError) as error:
            raise UnreachableError from error
        if status >= 500:
            raise UnreachableError

    async def _call(self, path: bytes, document: dict[str, object]) -> tuple[int, bytes]:
        """Post ``document`` and return status and body of the response.

        Raises:
            EngineLost: the service is unreachable, or its answer is broken or too large.
            TimeoutError: the answer was not complete within `_CALL_TIMEOUT_S`.
            ValueError: the URL is invalid.
        """
        if self._client is None:
            self._client = Upstream("predictor", self.url or "", _CALL_TIMEOUT_S, _CALL_TIMEOUT_S)
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            with await self._client.send("POST", path, _HEADERS, orjson.dumps(document)) as response:
                return response.status, await response.read_all(_MAX_ANSWER_BYTES)


_PROBE: dict[str, object] = {"prompt": "", "prompt_tokens": 1, "max_tokens": None}
"""The question of a call that no request makes."""

_MAX_BATCH = 64
_MAX_PENDING = 1024
"""Questions that wait for the next call, beyond which one that delays no request is not asked."""

_MAX_NAME_CHARS = 256
_MAX_TOKENS = 1 << 30

_MAX_ANSWER_BYTES = 1 << 20
"""Limit on an answer of the service; 64 predictions take about 10 KB."""

_MAX_REJECTIONS = 5
"""Calls in a row that the service may reject before each counts as failed. Convention."""

_CALL_TIMEOUT_S = 1.0
"""Timeout of one call to the service, in seconds. A request's own timeout is shorter and does not cancel the call."""

_HEADERS = [
    (b"content-type", b"application/json"),
    (b"accept-encoding", b"identity"),
    (b"x-deadline-ms", b"%d" % round(_CALL_TIMEOUT_S * 1000)),
]


def _read(answer: dict[str, float]) -> Prediction:
    """Parse one prediction. A service without online correction sends no raw quantiles."""
    raw = (float(answer["raw_p50"]), float(answer["raw_p90"])) if "raw_p50" in answer else None
    if raw is not None and not math.isfinite(sum(raw)):
        raise ValueError
    return Prediction(float(answer["length"]), float(answer["p90"]), "service", raw)


def _name(text: str) -> str | None:
    """Return a model or class name if the service accepts it, else None."""
    return text if 0 < len(text) <= _MAX_NAME_CHARS and text.isprintable() else None


def _shortened(prompt: str) -> str:
    """Cut a long prompt to the `HEAD_CHARS` and `TAIL_CHARS` that the predictor reads."""
    if len(prompt) <= HEAD_CHARS + TAIL_CHARS:
        return prompt
    return prompt[:HEAD_CHARS] + prompt[-TAIL_CHARS:]


def _answer_later(later: _Later, answer: asyncio.Future[Prediction | None]) -> None:
    prediction = None if answer.cancelled() else answer.result()
    later.on_answer(None if prediction is None else later.question.within(prediction))


class _CallFailedError(Exception):
    """The service did not respond, or responded without valid predictions."""


class _RejectedError(Exception):
    """The service rejected this input. It works, so the circuit breaker does not count a failure."""
