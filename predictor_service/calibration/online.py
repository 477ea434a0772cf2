"""Learning each model's and class's scale from answers that have finished, while the service runs.

Each (model, class) keeps a sliding window of its latest finished answers. A correction
(`predictor_service.calibration.corrections`) is fitted to that window and, while it holds few answers, to what is
nearest to it as
well: the model's other classes, then other models, then the length model's own word. What is borrowed counts as at most

    P^2 / (P + n)    answers, n being the answers that stand nearer, P = `BORROWED`,

so that it leads while there is nothing else and has faded before it could bias. Nothing is configured per model: a name
that was never seen starts from what the others taught, a correction comes with its first answers.

`OnlineCalibration` may be used from several threads. It holds numbers and names only, no text.
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
"""Answers that a (model, class) remembers."""

MAX_MODELS, MAX_WINDOWS = 32, 256
"""Beyond these, the model or class that was not heard of for longest is forgotten."""

BORROWED, OWN_WORD = 64.0, 16.0
"""P for answers of other classes and models, and for the length model's own word."""

_MOST_BORROWED_ROWS = 512
_OWN_WORD_ROWS = 64
_Z90 = NormalDist().inv_cdf(0.9)

Key = tuple[str, str]
"""Model and SLO class; "" where a caller named none."""

Row = tuple[float, float, float, float]
"""One answer: x, s, y as in `corrections.Answers`, and 1 if it ended, 0 if it was cut off."""

EVERY = ""
"""In a pool's key: every class of the model; as the model: every model."""


@dataclass(slots=True, frozen=True)
class Finished:
    """A finished answer of ``tokens``: what the length model had said of it before any correction, and whether
    ``max_tokens`` cut it off."""

    model: str
    slo_class: str
    p50: float
    p90: float
    tokens: int
    censored: bool


@dataclass(slots=True)
class Window:
    """The latest answers of one (model, class), and whether each was within the p90 that held when it came in."""

    rows: deque[Row] = field(default_factory=lambda: deque(maxlen=WINDOW))
    covered: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    unlearnt: int = 0
    """Answers since the last fit."""

    @property
    def due(self) -> bool:
        """Whether a new fit would tell more than the last: the window grew by a sixteenth."""
        return self.unlearnt > 0 and self.unlearnt * 16 >= len(self.rows)

    @property
    def calibration_error(self) -> float:
        """The share of answers within their p90, minus 0.9."""
        return sum(self.covered) / len(self.covered) - 0.9 if self.covered else 0.0


class OnlineCalibration:
    """Corrections by model and class. ``observe`` is cheap; `refit` does the work, when the caller has time for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: OrderedDict[Key, Window] = OrderedDict()
        self._corrections: dict[Key, Correction] = {}
        self._pools: dict[str, Correction] = {}
        self.observed = 0
        """Answers observed since the start."""

    def correct(self, model: str, slo_class: str, predicted: Prediction) -> Prediction:
        """``predicted`` on the scale of the (model, class), else of the model, else of all; unchanged before any."""
        found = self._correction(model, slo_class)
        return predicted if found is None else found.apply(predicted)

    def _correction(self, model: str, slo_class: str) -> Correction | None:
        return self._corrections.get((model, slo_class)) or self._pools.get(model) or self._pools.get(EVERY)

    def observe(self, answers: Iterable[Finished]) -> None:
        """Remember finished answers. They count from the next `refit` on."""
        with self._lock:
            for answer in answers:
                x, s = log_scale(answer.p50, answer.p90)
                raw = Prediction(answer.p50, answer.p50, answer.p90)
                served = self.correct(answer.model, answer.slo_class, raw)
                window = self._window((answer.model, answer.slo_class))
                window.rows.append((x, s, math.log(max(answer.tokens, 1)), 0.0 if answer.censored else 1.0))
                # Of an answer that max_tokens cut off, p90 was clamped there too: within, unless it had been lower.
                window.covered.append(answer.tokens <= served.p90)
                window.unlearnt += 1
                self.observed += 1

    def _window(self, key: Key) -> Window:
        window = self._windows.get(key)
        if window is None:
            self._make_room(key[0])
            window = self._windows[key] = Window()
        self._windows.move_to_end(key)
        return window

    def _make_room(self, model: str) -> None:
        while len(self._windows) >= MAX_WINDOWS:
            self._forget([next(iter(self._windows))])
        models = list(dict.fromkeys(name for name, _ in reversed(self._windows)))
        if model not in models and len(models) >= MAX_MODELS:
            self._forget([key for key in self._windows if key[0] == models[-1]])

    def _forget(self, keys: Sequence[Key]) -> None:
        for key in keys:
            del self._windows[key]
            self._corrections.pop(key, None)
        alive = {model for model, _ in self._windows}
        for model in {model for model, _ in keys} - alive - {EVERY}:
            self._pools.pop(model, None)

    # --- fitting -----------------------------------------------------------------------------------------------------

    def refit(self) -> int:
        """Fit anew where enough came in since the last time; answers how many windows. A millisecond or two each."""
        with self._lock:
            due = [key for key, window in self._windows.items() if window.due]
            snapshot = {key: list(window.rows) for key, window in self._windows.items()} if due else {}
            for key in due:
                self._windows[key].unlearnt = 0
        fitted = {key: _fit(*_tiers(snapshot, *key)) for key in due}
        pools = {model: _fit(*_tiers(snapshot, model, None)) for model in {model for model, _ in due}}
        if due:
            pools[EVERY] = _fit([], [], [row for rows in snapshot.values() for row in _latest(rows)])
        with self._lock:
            # What was forgotten meanwhile stays forgotten.
            self._corrections.update((key, made) for key, made in fitted.items() if key in self._windows)
            alive = {model for model, _ in self._windows} | {EVERY}
            self._pools.update((model, made) for model, made in pools.items() if model in alive)
        return len(due)

    # --- what others see of it ---------------------------------------------------------------------------------------

    def errors(self) -> dict[Key, tuple[float, int]]:
        """By (model, class): the calibration error of p90 (`Window.calibration_error`), and over how many answers."""
        with self._lock:
            return {key: (window.calibration_error, len(window.covered)) for key, window in self._windows.items()}

    def to_document(self) -> list[dict[str, Any]]:
        """The windows as plain data, the one heard of for longest first."""
        with self._lock:
            windows = [(key, list(window.rows)) for key, window in self._windows.items()]
        return [
            {"model": model, "slo_class": slo_class, "rows": [[round(v, 4) for v in row] for row in rows]}
            for (model, slo_class), rows in windows
        ]

    def restore(self, document: object) -> None:
        """Take over the windows of `to_document` and fit them. Raises ValueError when it is none; then nothing is
        taken over."""
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
    window.rows.extend((x, s, y, ended) for x, s, y, ended in values.tolist())
    window.unlearnt = len(window.rows)
    return (model, slo_class), window


def _tiers(windows: dict[Key, list[Row]], model: str, slo_class: str | None) -> tuple[list[Row], list[Row], list[Row]]:
    """The answers of the (model, class), of the model's other classes, of other models. Class None: all the model's."""
    own, near, far = [], [], []
    for (other, its_class), rows in windows.items():
        if other != model:
            far += _latest(rows)
        elif slo_class is None or its_class == slo_class:
            own += rows if slo_class is not None else _latest(rows)
        else:
            near += _latest(rows)
    return own, near, far


def _latest(rows: list[Row]) -> list[Row]:
    """A share of ``rows`` that leaves room for other windows'."""
    return rows[-128:]


def _fit(own: list[Row], near: list[Row], far: list[Row]) -> Correction:
    """The correction for ``own`` answers, with what is borrowed weighted as the module says."""
    near, far = _thinned(near), _thinned(far)
    tiers = [(own, 1.0)]
    nearer = float(len(own))
    for rows in (near, far):
        weight = _share(BORROWED, nearer, len(rows))
        tiers.append((rows, weight))
        nearer += weight * len(rows)
    word = _own_word([row for rows, _ in tiers for row in reversed(rows)])
    tiers.append((word, _share(OWN_WORD, nearer, len(word))))
    table = np.array([row for rows, _ in tiers for row in rows])
    weight = np.concatenate([np.full(len(rows), each) for rows, each in tiers])
    return fit_correction(Answers(table[:, 0], table[:, 1], table[:, 2], table[:, 3] > 0.5, weight))


def _share(most: float, nearer: float, rows: int) -> float:
    """What one of ``rows`` borrowed answers counts for."""
    return min(1.0, most * most / (most + nearer) / rows) if rows else 0.0


def _thinned(rows: list[Row]) -> list[Row]:
    return rows[:: math.ceil(len(rows) / _MOST_BORROWED_ROWS)] if rows else rows


def _own_word(rows: list[Row]) -> list[Row]:
    """What the length model would have had the first ``rows``' lengths be: log-normal through its quantiles.

    Each row takes the next level of a low-discrepancy sequence, so that together they are spread as predicted.
    """
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    normal = NormalDist()
    some = enumerate(rows[:_OWN_WORD_ROWS])
    return [(x, s, x + s / _Z90 * normal.inv_cdf((0.5 + i * golden) % 1.0), 1.0) for i, (x, s, _, _) in some]
