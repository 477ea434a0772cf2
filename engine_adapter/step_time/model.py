"""The online step-time model of one engine: SCORPIO's two forms and a step curve, refitted from reported steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np

from engine_adapter.step_time.curve import StepCurve, refitted
from engine_adapter.step_time.linear_forms import (
    FitQuality,
    Floats,
    StepTimes,
    fit_itl,
    fit_prefill,
    fit_quality,
    median,
)


@dataclass(slots=True)
class StepTimeModel:
    """SCORPIO's two forms and the step curve, refitted from the latest steps.

    `observe` only appends; it refits all three every ``refit_every`` steps, and four times less often after the first
    ``window`` steps. The fits of the two forms ignore outliers beyond five times the median.

    Attributes:
        times: the coefficients of both forms.
        window: steps of each kind (decode-only, with prefill) that are kept for the fits.
        min_samples: steps of a kind that a form needs. Until then its initial coefficients stay.
        learn: False makes `observe` do nothing.
        forms: False skips the fits of the two forms.
        curve: the step curve; by default derived from ``times``.
        itl_quality, prefill_quality, curve_quality: quality of the latest fits; None before the first one.
        steps_seen: number of observed steps.
        actual_s, predicted_s, error_s: of the steps before the latest refit, the sums of their durations, of what the
            curve predicted for them before it was fitted to them, and of the absolute differences.
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
    actual_s: float = 0.0
    predicted_s: float = 0.0
    error_s: float = 0.0
    _unscored: tuple[int, int] = field(default=(0, 0), repr=False)
    """Steps of each kind at the end of the window that the latest refit has not seen."""
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

    def observe(self, decode_requests: float, prefill_tokens: float, mean_context: float, elapsed_s: float) -> None:
        """Add one step to the window. Steps without work or time are ignored.

        Args:
            decode_requests: sequences that decoded; may be a virtual batch size.
            prefill_tokens: prompt tokens computed in the step.
            mean_context: mean context of the decoding sequences, in tokens.
            elapsed_s: duration of the step.
        """
        if not self.learn or elapsed_s <= 0 or decode_requests + prefill_tokens == 0:
            return
        decodes, mixed = self._unscored
        if prefill_tokens:
            self._unscored = decodes, mixed + 1
            self._mixed.append((float(prefill_tokens), float(decode_requests), mean_context, elapsed_s))
            if len(self._mixed) > self.window:
                self._mixed.popleft()
        else:
            self._unscored = decodes + 1, mixed
            self._decode.append((float(decode_requests), mean_context, elapsed_s))
            if len(self._decode) > self.window:
                self._decode.popleft()
        self.steps_seen += 1
        if self.steps_seen % (self.refit_every if self.steps_seen <= self.window else 4 * self.refit_every) == 0:
            self.refit()

    def latest(self, count: int) -> list[tuple[float, float, float, float]]:
        """Return the latest steps of each kind, at most ``count``: decodes, mean context, prompt tokens, seconds."""
        decode = islice(reversed(self._decode), count)
        mixed = islice(reversed(self._mixed), count)
        return [
            *((batch, context, 0.0, seconds) for batch, context, seconds in decode),
            *((batch, context, tokens, seconds) for tokens, batch, context, seconds in mixed),
        ]

    def start_over(self, times: StepTimes) -> None:
        """Drop the steps in the window, and reset the forms and the curve to ``times``."""
        self.forget()
        self.times, self.curve = times, StepCurve.of(times)

    def forget(self) -> None:
        """Drop the steps in the window, because they are outdated. The fits stay until new steps arrive."""
        self._decode.clear()
        self._mixed.clear()
        self._unscored = 0, 0

    def refit(self) -> None:
        """Refit the forms and the curve to the steps in the window, where there are at least ``min_samples``."""
        decode = _columns(self._decode, 3)
        mixed = _columns(self._mixed, 4)
        self._score(decode, mixed)
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

    def _score(self, decode: tuple[Floats, ...], mixed: tuple[Floats, ...]) -> None:
        """Compare the steps since the latest refit with what the curve predicted for them."""
        decodes, mixes = min(self._unscored[0], len(decode[0])), min(self._unscored[1], len(mixed[0]))
        self._unscored = 0, 0
        batch, length, seconds = (column[len(column) - decodes :] for column in decode)
        tokens, beside, context, taken = (column[len(column) - mixes :] for column in mixed)
        for predicted, actual in (
            (self.curve.steps_s(batch, batch * length), seconds),
            (self.curve.steps_s(beside, beside * context, tokens), taken),
        ):
            self.actual_s += float(actual.sum())
            self.predicted_s += float(predicted.sum())
            self.error_s += float(np.abs(predicted - actual).sum())

    def _refit_itl(self, batch: Floats, length: Floats, seconds: Floats) -> None:
        kept = seconds <= 5 * median(seconds)
        batch, length, seconds = batch[kept], length[kept], seconds[kept]
        a, b, c, d = fit_itl(batch, length, seconds, prior=self.times)
        self.times = replace(self.times, a=a, b=b, c=c, d=d)
        self.itl_quality = fit_quality((a * batch + c) * length + b * batch + d, seconds)

    def _refit_prefill(self, tokens: Floats, batch: Floats, length: Floats, seconds: Floats) -> None:
        # A prefill shares its step with decodes, so its time is what it adds to the step.
        decode_s = np.where(batch > 0, (self.times.a * batch + self.times.c) * length + self.times.b * batch, 0.0)
        decode_s += np.where(batch > 0, self.times.d, 0.0)
        extra = np.maximum(seconds - decode_s, 0.0)
        kept = extra <= 5 * max(median(extra), 1e-6) * np.maximum(tokens / median(tokens), 1.0)
        alpha, beta, theta, delta = fit_prefill(tokens[kept], extra[kept], prior=self.times)
        if alpha > 0:
            self.times = replace(self.times, alpha=alpha, beta=beta, theta=theta, delta=delta)
            predicted = np.where(tokens < theta, delta, alpha * tokens + beta)
            self.prefill_quality = fit_quality(predicted[kept], extra[kept])


def _columns(rows: Iterable[tuple[float, ...]], width: int) -> tuple[Floats, ...]:
    return tuple(np.fromiter(chain.from_iterable(rows), dtype=np.float64).reshape(-1, width).T)
