"""How good a length model is on answers it has not seen, and how fast it is where it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.buckets import DEFAULT_BINS, PAPER_BINS, STRATEGIES, Buckets, Places, fit_buckets, off_by
from predictor_service.model.features import prompt_features
from predictor_service.model.length_model import LengthPredictor, Prediction

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

MEASURES = (
    "kendall_tau",
    "mae_tokens",
    "rmse_tokens",
    "accuracy",
    "off_by_1",
    "off_by_2",
    "coverage_p90",
    "mae_constant",
    "latency_ms_p50",
    "latency_ms_p99",
    "throughput_rps",
)
"""What ``antares predictor evaluate --json`` prints."""

BATCH = 64
"""Prompts in one call where throughput is measured, as many as the service puts into a batch."""


def kendall_tau(x: Floats, y: Floats) -> float:
    """Kendall's tau-b of two samples of shape (rows,): (concordant - discordant) / sqrt(untied pairs in x *
    in y).

    O(rows^2) time, O(rows) memory at a time. 0 where one of them is constant.
    """
    agreement = untied_x = untied_y = 0.0
    for row in range(len(x) - 1):
        dx, dy = np.sign(x[row + 1 :] - x[row]), np.sign(y[row + 1 :] - y[row])
        agreement += float(dx @ dy)
        untied_x += float(np.abs(dx).sum())
        untied_y += float(np.abs(dy).sum())
    return agreement / float(np.sqrt(untied_x * untied_y)) if untied_x and untied_y else 0.0


def quality(predicted: Sequence[Prediction], actual: Floats, censored: Flags, reference: Floats) -> dict[str, float]:
    """Ranking, errors (tokens), bins and coverage of predictions for answers of ``actual`` tokens (shape (rows,)).

    The constants are the median and mean of ``reference``, the training answers' lengths, which also set the range of
    the `DEFAULT_BINS` equal-width bins behind ``accuracy`` (right bin) and ``off_by_n`` (at most n bins away). Lengths
    count as recorded, so an answer that was cut off at the output limit contributes the error against the limit.
    ``coverage_p90`` counts such an answer as covered when p90 reaches the limit (it may have gone on: an upper bound);
    ``coverage_p90_strict`` counts it as never covered (a lower bound).
    """
    length = np.array([p.length for p in predicted])
    p50, p90 = np.array([p.p50 for p in predicted]), np.array([p.p90 for p in predicted])
    reached = actual <= p90
    buckets = fit_buckets(reference, DEFAULT_BINS, "equal-width")
    guessed, right = buckets.place(length), buckets.place(actual)
    return {
        "rows": float(len(actual)),
        "kendall_tau": kendall_tau(length, actual),
        "mae_tokens": float(np.abs(length - actual).mean()),
        "rmse_tokens": float(np.sqrt(((length - actual) ** 2).mean())),
        "accuracy": off_by(guessed, right, 0),
        "off_by_1": off_by(guessed, right, 1),
        "off_by_2": off_by(guessed, right, 2),
        "mae_constant": float(np.abs(np.median(reference) - actual).mean()),
        "rmse_constant": float(np.sqrt(((reference.mean() - actual) ** 2).mean())),
        "coverage_p50": float((actual <= p50).mean()),
        "coverage_p90": float(reached.mean()),
        "coverage_p90_strict": float((reached & ~censored).mean()),
        "censored_share": float(censored.mean()),
    }


def bucket_row(buckets: Buckets, guessed: Places, actual: Floats) -> dict[str, Any]:
    """One row of the paper's table 5: guesses of bins (shape (rows,)) for answers of ``actual`` tokens.

    Read as tokens, a bin is its middle.
    """
    right, tokens = buckets.place(actual), buckets.middles[guessed]
    return {
        "bins": buckets.count,
        "kendall_tau": kendall_tau(tokens, actual),
        "accuracy": off_by(guessed, right, 0),
        "off_by_1": off_by(guessed, right, 1),
        "off_by_2": off_by(guessed, right, 2),
        "rmse_tokens": float(np.sqrt(((tokens - actual) ** 2).mean())),
    }


def bucket_study(predicted: Sequence[Prediction], actual: Floats, reference: Floats) -> list[dict[str, Any]]:
    """The paper's bucket study for a model that predicts tokens: its point estimates, cut into each set of bins."""
    length = np.array([p.length for p in predicted])
    rows = []
    for strategy in STRATEGIES:
        for count in PAPER_BINS:
            buckets = fit_buckets(reference, count, strategy)
            rows.append(
                {"strategy": strategy, "asked_bins": count} | bucket_row(buckets, buckets.place(length), actual)
            )
    return rows


def speed(model: LengthPredictor, asked: Sequence[Any]) -> dict[str, float]:
    """Milliseconds from a prompt (or its features) to its `Prediction`, one at a time; prompts a second in batches.

    On the calling thread; set OMP_NUM_THREADS=1 where numpy or torch would start threads of their own.
    """

    def predict(some: Sequence[Any]) -> None:
        hashed = not model.reads_text
        model.predict([prompt_features(one) if hashed and isinstance(one, str) else one for one in some])

    predict(asked[:20])
    seconds = []
    for one in asked:
        began = time.perf_counter()
        predict([one])
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    for first in range(0, len(asked), BATCH):
        predict(asked[first : first + BATCH])
    return {
        "latency_ms_p50": float(np.percentile(seconds, 50) * 1e3),
        "latency_ms_p99": float(np.percentile(seconds, 99) * 1e3),
        "throughput_rps": len(asked) / (time.perf_counter() - began),
    }


def rounded(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same to four digits after the point, whole numbers as integers: what a card or a table shows."""
    return {
        name: x if not isinstance(x, float) else int(x) if name == "rows" else round(x, 4)
        for name, x in metrics.items()
    }
