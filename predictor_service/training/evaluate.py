"""Metrics of a length model: accuracy on held-out answers, and speed on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.buckets import (
    DEFAULT_BINS,
    PAPER_BINS,
    STRATEGIES,
    BinIndices,
    Buckets,
    fit_buckets,
    off_by,
)
from predictor_service.model.features import prompt_features
from predictor_service.model.length_model import LengthPredictor, Prediction

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

REPORTED_METRICS = (
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
"""Keys of ``antares predictor evaluate --json``, in order."""

BATCH = 64
"""Prompts in one call when throughput is measured: the batch size of the service."""


def kendall_tau(x: Floats, y: Floats) -> float:
    """Return Kendall's tau-b of two samples of shape (rows,); 0 if one of them is constant.

    tau-b = (concordant - discordant pairs) / sqrt(pairs untied in x * pairs untied in y). O(rows^2) time, O(rows)
    memory.
    """
    agreement = untied_x = untied_y = 0.0
    for row in range(len(x) - 1):
        dx, dy = np.sign(x[row + 1 :] - x[row]), np.sign(y[row + 1 :] - y[row])
        agreement += float(dx @ dy)
        untied_x += float(np.abs(dx).sum())
        untied_y += float(np.abs(dy).sum())
    return agreement / float(np.sqrt(untied_x * untied_y)) if untied_x and untied_y else 0.0


def quality(predicted: Sequence[Prediction], actual: Floats, censored: Flags, reference: Floats) -> dict[str, float]:
    """Return ranking, errors (tokens), bin accuracy and coverage of predictions.

    Args:
        predicted: one prediction for each answer.
        actual: recorded output lengths in tokens, shape (rows,). A truncated answer counts with its recorded length.
        censored: True for truncated answers, shape (rows,).
        reference: lengths of the training answers. Their median and mean are the constant predictions, and their
            maximum sets the range of the `DEFAULT_BINS` equal-width bins of ``accuracy`` and ``off_by_n``.

    A truncated answer may have been longer. ``coverage_p90`` counts it as covered if p90 reaches its recorded length
    (an upper bound), ``coverage_p90_strict`` never does (a lower bound).
    """
    length = np.array([p.length for p in predicted])
    p50, p90 = np.array([p.p50 for p in predicted]), np.array([p.p90 for p in predicted])
    covered = actual <= p90
    buckets = fit_buckets(reference, DEFAULT_BINS, "equal-width")
    predicted_bins, actual_bins = buckets.index_of(length), buckets.index_of(actual)
    return {
        "rows": float(len(actual)),
        "kendall_tau": kendall_tau(length, actual),
        "mae_tokens": float(np.abs(length - actual).mean()),
        "rmse_tokens": float(np.sqrt(((length - actual) ** 2).mean())),
        "accuracy": off_by(predicted_bins, actual_bins, 0),
        "off_by_1": off_by(predicted_bins, actual_bins, 1),
        "off_by_2": off_by(predicted_bins, actual_bins, 2),
        "mae_constant": float(np.abs(np.median(reference) - actual).mean()),
        "rmse_constant": float(np.sqrt(((reference.mean() - actual) ** 2).mean())),
        "coverage_p50": float((actual <= p50).mean()),
        "coverage_p90": float(covered.mean()),
        "coverage_p90_strict": float((covered & ~censored).mean()),
        "censored_share": float(censored.mean()),
    }


def bucket_row(buckets: Buckets, predicted: BinIndices, actual: Floats) -> dict[str, Any]:
    """Return one row of table 5 of the paper, for predicted bins and output lengths (tokens), both of shape (rows,).

    In tokens, a bin stands for its midpoint.
    """
    actual_bins, tokens = buckets.index_of(actual), buckets.midpoints[predicted]
    return {
        "bins": buckets.count,
        "kendall_tau": kendall_tau(tokens, actual),
        "accuracy": off_by(predicted, actual_bins, 0),
        "off_by_1": off_by(predicted, actual_bins, 1),
        "off_by_2": off_by(predicted, actual_bins, 2),
        "rmse_tokens": float(np.sqrt(((tokens - actual) ** 2).mean())),
    }


def bucket_study(predicted: Sequence[Prediction], actual: Floats, reference: Floats) -> list[dict[str, Any]]:
    """Return table 5 of the paper for a model that predicts tokens: its point estimates, cut into each set of bins."""
    length = np.array([p.length for p in predicted])
    rows = []
    for strategy in STRATEGIES:
        for count in PAPER_BINS:
            buckets = fit_buckets(reference, count, strategy)
            rows.append(
                {"strategy": strategy, "asked_bins": count} | bucket_row(buckets, buckets.index_of(length), actual)
            )
    return rows


def measure_speed(model: LengthPredictor, inputs: Sequence[Any]) -> dict[str, float]:
    """Return latency percentiles (ms) of single predictions, and throughput (prompts/s) in batches of `BATCH`.

    ``inputs``: prompts or features. Computing the features of a prompt counts.

    NOTE: numpy and torch may start threads of their own. Set OMP_NUM_THREADS=1 to measure one core.
    """

    def predict(batch: Sequence[Any]) -> None:
        hashed = not model.reads_text
        model.predict([prompt_features(row) if hashed and isinstance(row, str) else row for row in batch])

    predict(inputs[:20])
    seconds = []
    for row in inputs:
        started = time.perf_counter()
        predict([row])
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    for first in range(0, len(inputs), BATCH):
        predict(inputs[first : first + BATCH])
    return {
        "latency_ms_p50": float(np.percentile(seconds, 50) * 1e3),
        "latency_ms_p99": float(np.percentile(seconds, 99) * 1e3),
        "throughput_rps": len(inputs) / (time.perf_counter() - started),
    }


def rounded(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics rounded to four digits, and ``rows`` as an integer."""
    return {
        name: x if not isinstance(x, float) else int(x) if name == "rows" else round(x, 4)
        for name, x in metrics.items()
    }
