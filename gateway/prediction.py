"""Output lengths for the scheduler: asked of the predictor service within a time box, else from running statistics.

The predictor is always optional: without it a request is scheduled by the lengths its class has shown so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import orjson

log = logging.getLogger("antares.prediction")

HEAD_CHARS, TAIL_CHARS = 3072, 1024
"""Of a longer prompt only the two ends are sent: the predictor reads no more, and refuses bodies of megabytes."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted output tokens of one sequence, with the 0.9 quantile, and who predicted (service or fallback)."""

    tokens: float
    p90: float
    source: str


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


class LengthPredictor:
    """The gateway's side of the predictor service. ``url`` None: only the fallback is used.

    A call takes at most ``timeout_s``; failures open a circuit breaker, so that a dead predictor costs nothing.
    """

    def __init__(self, url: str | None, timeout_s: float, statistics: LengthStatistics) -> None:
        self.url = url
        self._timeout = timeout_s
        self._statistics = statistics
        self._breaker = CircuitBreaker()
        self._client: httpx.AsyncClient | None = None

    @property
    def up(self) -> bool:
        """Whether the service is believed to answer."""
        return self.url is not None and self._breaker.closed

    async def predict(
        self, prompt: str, prompt_tokens: int, slo_class: str, max_tokens: int | None, min_tokens: int = 0
    ) -> Prediction:
        """Predict within the time box; never raises."""
        prediction = None
        if self.url is not None and self._breaker.allows():
            try:
                prediction = await self._ask(prompt, prompt_tokens, max_tokens, self._timeout)
                self._breaker.record(prediction is not None)
            except _RefusedError:
                self._breaker.record(True)
        prediction = prediction or self._statistics.predict(slo_class)
        high = float(max_tokens) if max_tokens is not None else float("inf")
        return Prediction(
            tokens=max(1.0, min_tokens, min(prediction.tokens, high)),
            p90=max(1.0, min_tokens, min(prediction.p90, high)),
            source=prediction.source,
        )

    async def warm_up(self, patience_s: float = 15.0) -> bool:
        """Wait until the service answers, so that no request pays for its first call; False if it does not."""
        until = time.monotonic() + patience_s
        while self.url is not None and time.monotonic() < until:
            with contextlib.suppress(_RefusedError):
                if await self._ask("", 1, None, timeout_s=1.0) is not None:
                    return True
            await asyncio.sleep(0.2)
        return False

    async def _ask(
        self, prompt: str, prompt_tokens: int, max_tokens: int | None, timeout_s: float
    ) -> Prediction | None:
        if len(prompt) > HEAD_CHARS + TAIL_CHARS:
            prompt = prompt[:HEAD_CHARS] + prompt[-TAIL_CHARS:]
        body = {"inputs": [{"prompt": prompt, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens or None}]}
        try:
            if self._client is None:
                # Loading the certificate store blocks the loop for 50 ms and serves nobody on a plain connection.
                verify = (self.url or "").startswith("https")
                self._client = httpx.AsyncClient(trust_env=False, timeout=5.0, verify=verify)
            async with asyncio.timeout(timeout_s):
                response = await self._client.post(
                    f"{self.url}/v1/predict",
                    content=orjson.dumps(body),
                    headers={
                        "content-type": "application/json",
                        "x-deadline-ms": str(max(1, round(timeout_s * 1000))),
                    },
                )
            if response.status_code in (400, 413, 422):
                raise _RefusedError
            if response.status_code != 200:
                return None
            answer = orjson.loads(response.content)["predictions"][0]
            length, p90 = float(answer["length"]), float(answer["p90"])
            return Prediction(length, p90, "service") if math.isfinite(length) and math.isfinite(p90) else None
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, LookupError, TypeError):
            return None

    def observe(self, slo_class: str, tokens: int) -> None:
        """A request finished: remember its length for the fallback."""
        self._statistics.observe(slo_class, tokens)

    async def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


class _RefusedError(Exception):
    """The service lives but will not predict for this input: no reason to stop asking it for others."""
