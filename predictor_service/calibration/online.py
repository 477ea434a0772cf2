"""Learns the scale of each served model and SLO class from finished answers, while the service runs.

Each (model, class) keeps a sliding window of its latest finished answers. A correction
(`predictor_service.calibration.corrections`) is fitted to the window. While the window holds few answers, the fit also
uses three other sources: other classes of the model, then other models, then a prior under which the length model is
right. The answers borrowed from one source count as at most

    P^2 / (P + n)    answers,

where n is the weight of the nearer sources and P is `BORROWED_WEIGHT` or `PRIOR_WEIGHT`. So borrowed answers dominate a
new window and fade before they bias a full one. No model needs configuration: an unknown name starts with the
correction of all models, and has its own after its first answers.

`OnlineCalibration` is thread-safe. It stores numbers and names, never text.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from predictor_service.calibration.corrections import Answers, Correction, fit_correction, log_scale
from predictor_service.model.length_model import Prediction

WINDOW = 512
"""Latest answers that each (model, class) keeps."""

MAX_MODELS, MAX_WINDOWS = 32, 256
"""Bounds on models and on (model, class) pairs. Beyond them, the least recently observed one is dropped."""

BORROWED_WEIGHT, PRIOR_WEIGHT = 64.0, 16.0
"""P, in answers: of other classes and models, and of the prior."""

_MAX_BORROWED_ROWS = 512
"""Rows of one source that a fit reads; more are subsampled. Bounds the time of a fit."""

_PRIOR_ROWS = 64
_LATEST_ROWS = 128
"""Rows of one window that other windows borrow, so that no window dominates."""

_Z90 = NormalDist().inv_cdf(0.9)

Key = tuple[str, str]
"""Model and SLO class; "" if the caller names none."""

Row = tuple[float, float, float, float]
"""One answer: x, s, y of `predictor_service.calibration.corrections.Answers`, then 1 if complete, 0 if truncated."""

ALL_MODELS = ""
"""Key of the pooled correction of all models. A model without a name has the same key, and so uses it."""


@dataclass(slots=True, frozen=True)
class FinishedAnswer:
    """A finished answer and the raw prediction for it.

    ``p50`` and ``p90``: quantiles (tokens) of the length model, before any correction. ``tokens``: the output length.
    ``censored``: whether ``max_tokens`` truncated the answer.
    """

    model: str
    slo_class: str
    p50: float
    p90: float
    tokens: int
    censored: bool


@dataclass(slots=True)
class Window:
    """The latest answers of one (model, class), and whether each was within the p90 in effect when it was reported."""

    rows: deque[Row] = field(default_factory=lambda: deque(maxlen=WINDOW))
    covered: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    since_fit: int = 0
    """Answers since the last fit."""

    @property
    def due(self) -> bool:
        """Whether to fit again: a sixteenth of the window is new."""
        return self.since_fit > 0 and self.since_fit * 16 >= len(self.rows)

    @property
    def calibration_error(self) -> float:
        """Share of the answers that were within their p90, minus 0.9; 0 if there are none."""
        return sum(self.covered) / len(self.covered) - 0.9 if self.covered else 0.0


class OnlineCalibration:
    """Corrections by model and class. `observe` is cheap; `refit` is not, so callers run it off the request path."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: OrderedDict[Key, Window] = OrderedDict()
        self._corrections: dict[Key, Correction] = {}
        self._pools: dict[str, Correction] = {}
        self.observed = 0
        """Answers observed since the start."""

    def correct(self, model: str, slo_class: str, predicted: Prediction) -> Prediction:
        """Return ``predicted`` with the correction of the class, else of the model, else of all models.

        Without any correction, ``predicted`` is returned unchanged.
        """
        correction = self._correction(model, slo_class)
        return predicted if correction is None else correction.apply(predicted)

    def _correction(self, model: str, slo_class: str) -> Correction | None:
        return self._corrections.get((model, slo_class)) or self._pools.get(model) or self._pools.get(ALL_MODELS)

    def observe(self, answers: Iterable[FinishedAnswer]) -> None:
        """Store finished answers. The next `refit` uses them."""
        with self._lock:
            for answer in answers:
                x, s = log_scale(answer.p50, answer.p90)
                raw = Prediction(answer.p50, answer.p50, answer.p90)
                served = self.correct(answer.model, answer.slo_class, raw)
                window = self._window((answer.model, answer.slo_class))
                window.rows.append((x, s, math.log(max(answer.tokens, 1)), 0.0 if answer.censored else 1.0))
                # max_tokens clamps p90 as well, so that a truncated answer is covered unless p90 was below max_tokens.
                window.covered.append(answer.tokens <= served.p90)
                window.since_fit += 1
                self.observed += 1

    def _window(self, key: Key) -> Window:
        window = self._windows.get(key)
        if window is None:
            self._evict_for(key[0])
            window = self._windows[key] = Window()
        self._windows.move_to_end(key)
        return window

    def _evict_for(self, model: str) -> None:
        while len(self._windows) >= MAX_WINDOWS:
            self._drop([next(iter(self._windows))])
        models = list(dict.fromkeys(name for name, _ in reversed(self._windows)))
        if model not in models and len(models) >= MAX_MODELS:
            self._drop([key for key in self._windows if key[0] == models[-1]])

    def _drop(self, keys: Sequence[Key]) -> None:
        for key in keys:
            del self._windows[key]
            self._corrections.pop(key, None)
        remaining = {model for model, _ in self._windows}
        for model in {model for model, _ in keys} - remaining - {ALL_MODELS}:
            self._pools.pop(model, None)

    def refit(self) -> int:
        """Fit the windows that are due and return how many there were. A fit takes one or two milliseconds."""
        with self._lock:
            due = [key for key, window in self._windows.items() if window.due]
            snapshot = {key: list(window.rows) for key, window in self._windows.items()} if due else {}
            for key in due:
                self._windows[key].since_fit = 0
        fitted = {key: _fit(*_tiers(snapshot, *key)) for key in due}
        pools = {model: _fit(*_tiers(snapshot, model, None)) for model in {model for model, _ in due}}
        if due:
            pools[ALL_MODELS] = _fit([], [], [row for rows in snapshot.values() for row in _latest(rows)])
        with self._lock:
            # Skip windows that were dropped during the fit.
            self._corrections.update((key, fit) for key, fit in fitted.items() if key in self._windows)
            remaining = {model for model, _ in self._windows} | {ALL_MODELS}
            self._pools.update((model, fit) for model, fit in pools.items() if model in remaining)
        return len(due)

    def calibration_errors(self) -> dict[Key, tuple[float, int]]:
        """Return `Window.calibration_error` and its number of answers, by (model, class)."""
        with self._lock:
            return {key: (window.calibration_error, len(window.covered)) for key, window in self._windows.items()}

    def to_document(self) -> list[dict[str, Any]]:
        """Return the windows as data for JSON, least recently observed first."""
        with self._lock:
            windows = [(key, list(window.rows)) for key, window in self._windows.items()]
        return [
            {"model": model, "slo_class": slo_class, "rows": [[round(v, 4) for v in row] for row in rows]}
            for (model, slo_class), rows in windows
        ]

    def restore(self, document: object) -> None:
        """Replace the windows with those of `to_document`, and fit them.

        Raises:
            ValueError: ``document`` is malformed; the windows are unchanged.
        """
        windows = [_window_from(entry) for entry in document] if isinstance(document, list) else None
        if windows is None or len(windows) > MAX_WINDOWS:
            raise ValueError(f"expected a list of at most {MAX_WINDOWS} windows")
        with self._lock:
            self._windows = OrderedDict(windows)
        self.refit()


def _window_from(entry: object) -> tuple[Key, Window]:
    if not isinstance(entry, dict):
        raise ValueError("a window must be an object")
    model, slo_class, rows = entry.get("model"), entry.get("slo_class"), entry.get("rows")
    if not isinstance(model, str) or not isinstance(slo_class, str) or not isinstance(rows, list):
        raise ValueError("a window needs 'model', 'slo_class' and 'rows'")
    try:
        values = np.array(rows, dtype=np.float64).reshape(-1, 4)
    except (TypeError, ValueError):
        raise ValueError("'rows' must be rows of four numbers") from None
    if not np.isfinite(values).all() or (np.abs(values) > 100).any() or (values[:, 1] <= 0).any():
        raise ValueError("'rows' must be logarithms of token counts")
    window = Window()
    window.rows.extend((x, s, y, complete) for x, s, y, complete in values.tolist())
    window.since_fit = len(window.rows)
    return (model, slo_class), window


def _tiers(windows: dict[Key, list[Row]], model: str, slo_class: str | None) -> tuple[list[Row], list[Row], list[Row]]:
    """Return rows of the class, of other classes of the model, and of other models; class None means all classes."""
    own, near, far = [], [], []
    for (other, other_class), rows in windows.items():
        if other != model:
            far += _latest(rows)
        elif slo_class is None or other_class == slo_class:
            own += rows if slo_class is not None else _latest(rows)
        else:
            near += _latest(rows)
    return own, near, far


def _latest(rows: list[Row]) -> list[Row]:
    return rows[-_LATEST_ROWS:]


def _fit(own: list[Row], near: list[Row], far: list[Row]) -> Correction:
    """Return the correction for ``own`` rows, with borrowed rows weighted as the module describes."""
    near, far = _subsample(near), _subsample(far)
    tiers = [(own, 1.0)]
    nearer = float(len(own))
    for rows in (near, far):
        weight = _borrowed_row_weight(BORROWED_WEIGHT, nearer, len(rows))
        tiers.append((rows, weight))
        nearer += weight * len(rows)
    prior = _prior_rows([row for rows, _ in tiers for row in reversed(rows)])
    tiers.append((prior, _borrowed_row_weight(PRIOR_WEIGHT, nearer, len(prior))))
    table = np.array([row for rows, _ in tiers for row in rows])
    weight = np.concatenate([np.full(len(rows), each) for rows, each in tiers])
    return fit_correction(Answers(table[:, 0], table[:, 1], table[:, 2], table[:, 3] > 0.5, weight))


def _borrowed_row_weight(bound: float, nearer: float, rows: int) -> float:
    """Return the weight of each of ``rows`` borrowed rows; ``bound`` is P and ``nearer`` is n of the module."""
    return min(1.0, bound * bound / (bound + nearer) / rows) if rows else 0.0


def _subsample(rows: list[Row]) -> list[Row]:
    return rows[:: math.ceil(len(rows) / _MAX_BORROWED_ROWS)] if rows else rows


def _prior_rows(rows: list[Row]) -> list[Row]:
    """Return the first of ``rows`` with lengths as predicted: log-normal through p50 and p90.

    Each row takes the next level of a low-discrepancy sequence, so that all of them spread as predicted.
    """
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    normal = NormalDist()
    numbered = enumerate(rows[:_PRIOR_ROWS])
    return [(x, s, x + s / _Z90 * normal.inv_cdf((0.5 + i * golden) % 1.0), 1.0) for i, (x, s, _, _) in numbered]
