"""What an engine's steps take, as they are reported: SCORPIO's two forms, and the curve that they are cuts through."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from engine_adapter.step_time.curve import StepCurve, refitted
from engine_adapter.step_time.linear_forms import FitQuality, Floats, StepTimes, fit_itl, fit_prefill, fit_quality


@dataclass(slots=True)
class StepTimeModel:
    """Both forms and the curve, refitted from the latest steps as they are reported.

    ``observe`` is cheap (an append). All are fitted again over the last ``window`` steps of each kind every
    ``refit_every`` steps, and four times as seldom once ``window`` steps have been seen. For the forms, outliers beyond
    five times the median are dropped; until ``min_samples`` steps of a kind have been seen, the initial coefficients of
    its form hold. ``forms``: False where nobody asks for them; they are then left as they are. ``curve``: what is known
    of it, by default what the forms say.
    """

    times: StepTimes = field(default_factory=StepTimes)
    window: int = 512
    refit_every: int = 32
    min_samples: int = 5
    learn: bool = True
    forms: bool = True
    curve: StepCurve = None  # type: ignore[assignment]  # until __post_init__
    itl_quality: FitQuality | None = None
    prefill_quality: FitQuality | None = None
    curve_quality: FitQuality | None = None
    steps_seen: int = 0
    _decode: deque[tuple[float, float, float]] = field(default_factory=deque, repr=False)
    _mixed: deque[tuple[float, float, float, float]] = field(default_factory=deque, repr=False)

    def __post_init__(self) -> None:
        if self.curve is None:
            self.curve = StepCurve.of(self.times)

    def itl(self, batch: float, length: float) -> float:
        """ITL(B, L) in seconds."""
        return self.times.itl(batch, length)

    def prefill(self, tokens: float) -> float:
        """t(p) in seconds."""
        return self.times.prefill(tokens)

    def observe(self, decode_requests: float, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        """Learn from one step of ``elapsed_s`` seconds.

        ``decode_requests`` decoded in it (or on average), ``prefill_tokens`` prompt tokens were prefilled.
        """
        if not self.learn or elapsed_s <= 0 or decode_requests + prefill_tokens == 0:
            return
        if prefill_tokens:
            self._mixed.append((float(prefill_tokens), float(decode_requests), mean_context, elapsed_s))
            if len(self._mixed) > self.window:
                self._mixed.popleft()
        else:
            self._decode.append((float(decode_requests), mean_context, elapsed_s))
            if len(self._decode) > self.window:
                self._decode.popleft()
        self.steps_seen += 1
        if self.steps_seen % (self.refit_every if self.steps_seen <= self.window else 4 * self.refit_every) == 0:
            self.refit()

    def start_over(self, times: StepTimes) -> None:
        """The engine may be another one now: back to the first guess."""
        self.forget()
        self.times, self.curve = times, StepCurve.of(times)

    def forget(self) -> None:
        """Drop the steps in the window: they tell of times that are over. What was learnt stays until new ones come."""
        self._decode.clear()
        self._mixed.clear()

    def refit(self) -> None:
        """Fit all to the steps in the window, where there are enough of them."""
        decode = _columns(self._decode, 3)
        mixed = _columns(self._mixed, 4)
        if self.forms and len(self._decode) >= self.min_samples:
            self._refit_itl(*decode)
        if self.forms and len(self._mixed) >= self.min_samples:
            self._refit_prefill(*mixed)
        if len(self._decode) + len(self._mixed) >= self.min_samples:
            batch = np.concatenate([decode[0], mixed[1]])
            context = batch * np.concatenate([decode[1], mixed[2]])
            tokens = np.concatenate([np.zeros(len(decode[0])), mixed[0]])
            seconds = np.concatenate([decode[2], mixed[3]])
            self.curve = refitted(self.curve, batch, context, tokens, seconds)
            self.curve_quality = fit_quality(self.curve.steps_s(batch, context, tokens), seconds)

    def _refit_itl(self, batch: Floats, length: Floats, seconds: Floats) -> None:
        kept = seconds <= 5 * np.median(seconds)
        batch, length, seconds = batch[kept], length[kept], seconds[kept]
        a, b, c, d = fit_itl(batch, length, seconds, prior=self.times)
        self.times = replace(self.times, a=a, b=b, c=c, d=d)
        self.itl_quality = fit_quality((a * batch + c) * length + b * batch + d, seconds)

    def _refit_prefill(self, tokens: Floats, batch: Floats, length: Floats, seconds: Floats) -> None:
        # A prefill rides along with decodes: what it adds to the step is what a queue of prefills costs.
        decoding = np.where(batch > 0, (self.times.a * batch + self.times.c) * length + self.times.b * batch, 0.0)
        decoding += np.where(batch > 0, self.times.d, 0.0)
        extra = np.maximum(seconds - decoding, 0.0)
        kept = extra <= 5 * max(float(np.median(extra)), 1e-6) * np.maximum(tokens / np.median(tokens), 1.0)
        alpha, beta, theta, delta = fit_prefill(tokens[kept], extra[kept])
        if alpha > 0:
            self.times = replace(self.times, alpha=alpha, beta=beta, theta=theta, delta=delta)
            predicted = np.where(tokens < theta, delta, alpha * tokens + beta)
            self.prefill_quality = fit_quality(predicted[kept], extra[kept])


def _columns(rows: Iterable[tuple[float, ...]], width: int) -> tuple[Floats, ...]:
    return tuple(np.asarray(list(rows), dtype=np.float64).reshape(-1, width).T)
