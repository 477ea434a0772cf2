"""How good the length model is on answers it has not seen, and how fast it is where it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor_service.features import prompt_features
from predictor_service.length_model import LengthModel
from predictor_service.train import Examples

Floats = NDArray[np.float64]


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


def quality(model: LengthModel, test: Examples, reference: Floats) -> dict[str, float]:
    """Ranking, errors (tokens) and coverage on ``test``; the constants are the median and mean of
    ``reference``.

    Lengths count as recorded, so an answer that was cut off at the output limit contributes the error against
    the limit. ``coverage_p90`` counts such an answer as covered when p90 reaches the limit (it may have gone
    on: an upper bound); ``coverage_p90_strict`` counts it as never covered (a lower bound).
    """
    predicted = model.predict(test.features)
    length = np.array([p.length for p in predicted])
    p50, p90 = np.array([p.p50 for p in predicted]), np.array([p.p90 for p in predicted])
    actual = test.length
    reached = actual <= p90
    return {
        "rows": float(len(actual)),
        "kendall_tau": kendall_tau(length, actual),
        "mae_tokens": float(np.abs(length - actual).mean()),
        "rmse_tokens": float(np.sqrt(((length - actual) ** 2).mean())),
        "mae_constant": float(np.abs(np.median(reference) - actual).mean()),
        "rmse_constant": float(np.sqrt(((reference.mean() - actual) ** 2).mean())),
        "coverage_p50": float((actual <= p50).mean()),
        "coverage_p90": float(reached.mean()),
        "coverage_p90_strict": float((reached & ~test.censored).mean()),
        "censored_share": float(test.censored.mean()),
    }


def speed(model: LengthModel, prompts: Sequence[str]) -> dict[str, float]:
    """Milliseconds from a prompt's text to its `Prediction`, one at a time on one thread, and prompts per
    second."""
    for prompt in prompts[:20]:
        model.predict([prompt_features(prompt)])
    seconds = []
    for prompt in prompts:
        began = time.perf_counter()
        model.predict([prompt_features(prompt)])
        seconds.append(time.perf_counter() - began)
    return {
        "latency_ms_p50": float(np.percentile(seconds, 50) * 1e3),
        "latency_ms_p99": float(np.percentile(seconds, 99) * 1e3),
        "throughput_rps": len(seconds) / float(np.sum(seconds)),
    }


def rounded(metrics: dict[str, float]) -> dict[str, Any]:
    """The same to four digits after the point, whole numbers as integers: what a card or a table shows."""
    return {name: int(x) if x.is_integer() and name == "rows" else round(x, 4) for name, x in metrics.items()}
