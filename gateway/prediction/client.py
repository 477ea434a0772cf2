"""Output lengths for the scheduler: asked of the predictor service within a time box, else from running statistics.

The predictor is always optional: without it a request is scheduled by the lengths its class has shown so far. What
finishes is told to the running statistics and, where the service had predicted it, to the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import httpx
import orjson

from gateway.prediction.reports import LengthReport, LengthReports, UnreachableError

log = logging.getLogger("antares.prediction")

HEAD_CHARS, TAIL_CHARS = 15_360, 1024
"""Of a longer prompt only the two ends are sent: the predictor reads less still, and knows no longer length."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted output tokens of one sequence, with the 0.9 quantile, and who predicted (service or fallback).

    ``raw``: the service's p50 and p90 before it corrected them by what finished; it wants them back with the outcome.
    """

    tokens: float
    p90: float
    source: str
    raw: tuple[float, float] | None = None


@dataclass(slots=True)
class LengthStatistics:
    """Output lengths seen lately, per class: the fallback prediction. ``expected`` stands in before any was seen."""

    expected: float = 128.0
    window: int = 256
    _seen: defaultdict[str, deque[int]] = field(default_factory=lambda: defaultdict(deque))

    def observe(self, slo_class: str, tokens: int) -> None:
        """A request of the class finished with so many output tokens per sequence."""
        seen = self._seen[slo_class]
        seen.append(tokens)
        if len(seen) > self.window:
            seen.popleft()

    def predict(self, slo_class: str) -> Prediction:
        """The class's median and 0.9 quantile over the window."""
        lengths = sorted(self._seen[slo_class])
        if not lengths:
            return Prediction(self.expected, 2 * self.expected, "fallback")
        return Prediction(
            lengths[len(lengths) // 2], lengths[min(len(lengths) - 1, int(0.9 * len(lengths)))], "fallback"
        )


class CircuitBreaker:
    """Stops asking a service that does not answer: ``threshold`` failures in a row open it for ``pause_s`` seconds.

    After the pause one call is let through to see; its answer closes the breaker or opens it again.
    """

    def __init__(self, threshold: int = 3, pause_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold, self._pause, self._clock = threshold, pause_s, clock
        self._failures = 0
        self._open_until = 0.0

    @property
    def closed(self) -> bool:
        """The service answered last time, or has not failed often enough to tell."""
        return self._failures < self._threshold

    def allows(self) -> bool:
        """Whether to call now. While open, claims the one trial call."""
        if self.closed:
            return True
        now = self._clock()
        if now < self._open_until:
            return False
        self._open_until = now + self._pause
        return True

    def record(self, success: bool) -> None:
        """How the call went."""
        if success:
            self._failures = 0
            return
        self._failures += 1
        if self._failures >= self._threshold:
            self._open_until = self._clock() + self._pause


@dataclass(slots=True)
class _Asked:
    question: dict[str, object]
    answer: asyncio.Future[Prediction | None]


class LengthPredictor:
    """The gateway's side of the predictor service. ``url`` None: only the fallback is used.

    A request waits at most ``timeout_s``; failures open a circuit breaker, so that a dead predictor costs nothing.
    What is asked while a call is under way goes out together in the next one: one call at a time, whatever the load.
    """

    def __init__(self, url: str | None, timeout_s: float, statistics: LengthStatistics) -> None:
        self.url = url
        self._timeout = timeout_s
        self._statistics = statistics
        self._breaker = CircuitBreaker()
        self._client: httpx.AsyncClient | None = None
        self.reports = LengthReports(self._post_reports)
        """What finished, on its way to the service."""
        self._asked: deque[_Asked] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._calls = 0
        self._blamed = 0

    @property
    def up(self) -> bool:
        """Whether the service is believed to answer."""
        return self.url is not None and self._breaker.closed and not self._late

    @property
    def _late(self) -> bool:
        """A call is under way, and somebody has waited for it in vain."""
        return self._sender is not None and not self._sender.done() and self._blamed == self._calls

    async def predict(
        self,
        prompt: str,
        prompt_tokens: int,
        slo_class: str,
        max_tokens: int | None,
        min_tokens: int = 0,
        *,
        model: str = "",
        request_id: str | None = None,
    ) -> Prediction:
        """Predict what ``model`` answers, within the time box; never raises."""
        prediction = None
        if self.url is not None and self._breaker.allows():
            # A limit that the service would refuse must not spoil the call for those who share it.
            limit = max_tokens if max_tokens is not None and 1 <= max_tokens <= _MAX_TOKENS else None
            question = {"prompt": _shortened(prompt), "prompt_tokens": prompt_tokens, "max_tokens": limit}
            question |= {"model": _name(model), "slo_class": _name(slo_class), "id": request_id}
            prediction = await self._ask(question)
        prediction = prediction or self._statistics.predict(slo_class)
        high = float(max_tokens) if max_tokens is not None else float("inf")
        return Prediction(
            tokens=max(1.0, min_tokens, min(prediction.tokens, high)),
            p90=max(1.0, min_tokens, min(prediction.p90, high)),
            source=prediction.source,
            raw=prediction.raw,
        )

    async def warm_up(self, max_wait_s: float = 5.0) -> bool:
        """Wait until the service answers, so that no request pays for its first call; False if it does not."""
        until = time.monotonic() + max_wait_s
        while self.url is not None and time.monotonic() < until:
            with contextlib.suppress(_FailedError, _RefusedError):
                await self._post([{"prompt": "", "prompt_tokens": 1, "max_tokens": None}])
                return True
            await asyncio.sleep(0.2)
        return False

    def observe(self, slo_class: str, tokens: int) -> None:
        """A request finished: remember its length for the fallback."""
        self._statistics.observe(slo_class, tokens)

    def report(
        self, prediction: Prediction, request_id: str, model: str, slo_class: str, tokens: int, censored: bool
    ) -> None:
        """Tell the service what came of its ``prediction``; costs the caller nothing. ``censored``: a limit stopped it.

        Nothing is told of a prediction that was not the service's.
        """
        if prediction.raw is not None:
            names = (_name(model) or "", _name(slo_class) or "")
            self.reports.add(LengthReport(request_id, *names, *prediction.raw, tokens, censored))

    async def close(self) -> None:
        """Close the connection."""
        await self.reports.close()
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _ask(self, question: dict[str, object]) -> Prediction | None:
        """The service's answer, or None when there is none in time."""
        if self._late:
            return None  # this one would only wait behind it
        asked = _Asked(question, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="ask the predictor")
        await asyncio.wait({asked.answer}, timeout=self._timeout)
        if not asked.answer.done():
            asked.answer.cancel()
            self._blame()
            return None
        return asked.answer.result()

    def _blame(self) -> None:
        """Count the call under way as failed: once, however many wait for it."""
        if self._blamed != self._calls:
            self._blamed = self._calls
            self._breaker.record(False)

    async def _send(self) -> None:
        # NOTE: the call itself is not cancelled when a request's time is up: cancelling httpx while it connects leaks
        # the connection. It ends by its own timeout.
        while self._asked:
            batch = [self._asked.popleft() for _ in range(min(len(self._asked), _MAX_BATCH))]
            batch = [asked for asked in batch if not asked.answer.done()]
            if not batch:
                continue
            answers: list[Prediction | None] = [None] * len(batch)
            self._calls += 1
            try:
                answers = [*await self._post([asked.question for asked in batch])]
            except _RefusedError:
                pass
            except _FailedError:
                self._blame()
            if self._blamed != self._calls:
                self._breaker.record(True)
            for asked, answer in zip(batch, answers, strict=True):
                if not asked.answer.done():
                    asked.answer.set_result(answer)

    async def _post(self, questions: list[dict[str, object]]) -> list[Prediction]:
        try:
            response = await self._call("/v1/predict", {"inputs": questions})
            if response.status_code in (400, 413, 422):
                raise _RefusedError
            if response.status_code != 200:
                raise _FailedError
            found = [_read(answer) for answer in orjson.loads(response.content)["predictions"]]
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, LookupError, TypeError) as error:
            raise _FailedError from error
        if len(found) != len(questions) or not all(math.isfinite(p.tokens + p.p90) for p in found):
            raise _FailedError
        return found

    async def _post_reports(self, reports: list[LengthReport]) -> None:
        observations = [
            {**asdict(report), "model": report.model or None, "slo_class": report.slo_class or None}
            for report in reports
        ]
        try:
            response = await self._call("/v1/observe", {"observations": observations})
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise UnreachableError from error
        if response.status_code >= 500:
            raise UnreachableError

    async def _call(self, path: str, document: dict[str, object]) -> httpx.Response:
        if self._client is None:
            limits = httpx.Limits(max_connections=4, max_keepalive_connections=2)
            # Loading the certificate store blocks the loop for 50 ms and serves nobody on a plain connection.
            verify = (self.url or "").startswith("https")
            self._client = httpx.AsyncClient(trust_env=False, timeout=_CALL_TIMEOUT_S, limits=limits, verify=verify)
        return await self._client.post(
            f"{self.url}{path}",
            content=orjson.dumps(document),
            headers={"content-type": "application/json", "x-deadline-ms": str(round(_CALL_TIMEOUT_S * 1000))},
        )


_MAX_BATCH = 64
_MAX_NAME_CHARS = 256
_MAX_TOKENS = 1 << 30
_CALL_TIMEOUT_S = 1.0


def _read(answer: dict[str, float]) -> Prediction:
    """One prediction of the service. A predictor that does not learn online sends no raw quantiles."""
    raw = (float(answer["raw_p50"]), float(answer["raw_p90"])) if "raw_p50" in answer else None
    if raw is not None and not math.isfinite(sum(raw)):
        raise ValueError
    return Prediction(float(answer["length"]), float(answer["p90"]), "service", raw)


def _name(text: str) -> str | None:
    """A model's or class's name as far as the service takes it."""
    return text if 0 < len(text) <= _MAX_NAME_CHARS and text.isprintable() else None


def _shortened(prompt: str) -> str:
    """What the predictor reads of a long prompt; the rest need not travel."""
    if len(prompt) <= HEAD_CHARS + TAIL_CHARS:
        return prompt
    return prompt[:HEAD_CHARS] + prompt[-TAIL_CHARS:]


class _FailedError(Exception):
    """The service did not answer, or not with predictions."""


class _RefusedError(Exception):
    """The service lives but will not predict for this input: no reason to stop asking it for others."""
