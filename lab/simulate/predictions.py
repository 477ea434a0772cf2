"""Predicted output lengths for a simulated gateway: exact, with noise, or with a real predictor's errors.

Predictors:

- ``oracle``: the true length.
- ``noise:SIGMA``: the true length times exp(N(0, SIGMA)).
- ``constant``: the median of the workload for every request.
- ``reversed``: the lengths in reverse order. The request with the longest answer gets the shortest prediction.
- ``shipped``: the length with the errors of the shipped model.
- ``shipped:FACTOR``: the same times FACTOR, as from a model that was trained on shorter or longer answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lab.workload import WorkloadRequest
from lab.workload.lengths import DATA

Floats = NDArray[np.float64]

SHIPPED = DATA / "shipped_predictor.npz"
"""Lengths of held-out answers and the shipped model's predictions for them (`benchmarks.predictor.make_errors`)."""

_Z90 = 1.2815515655446004
"""The 90th percentile of the standard normal distribution."""

_NEIGHBOURS = 0.01
"""Maximum distance in rank between a request and the held-out answer whose error it gets; a fraction of all answers."""


@dataclass(frozen=True, slots=True)
class PredictedLength:
    """A predicted output length and its 90th percentile (tokens)."""

    tokens: float
    p90: float


def predict(predictor: str, workload: Sequence[WorkloadRequest], seed: int) -> list[PredictedLength]:
    """Return one prediction per request of ``workload``. The same ``seed`` gives the same errors.

    Raises:
        ValueError: an unknown predictor or an invalid parameter; the message lists what is accepted.
    """
    if not workload:
        return []
    lengths = np.array([request.output_tokens for request in workload], dtype=float)
    if predictor in _WITHOUT_PARAMETER:
        return _WITHOUT_PARAMETER[predictor](lengths)
    kind, colon, parameter = predictor.partition(":")
    if kind == "noise":
        sigma = _number(parameter, 10)
        if sigma is None:
            raise ValueError(f"noise:SIGMA needs a number from 0 to below 10, such as noise:0.5; got {parameter!r}")
        return _noisy(lengths, sigma, np.random.default_rng([seed, 0x9E37]))
    if kind == "shipped":
        factor = _number(parameter, 1000) if colon else 1.0
        if not factor:
            raise ValueError(
                f"shipped:FACTOR needs a number above 0 and below 1000, such as shipped:2; got {parameter!r}"
            )
        return _shipped(lengths, factor, np.random.default_rng([seed, 0x51E9]))
    raise ValueError(
        f"unknown predictor {predictor!r}: choose shipped, shipped:FACTOR (such as shipped:2), oracle, "
        "noise:SIGMA (such as noise:0.5), constant or reversed"
    )


def _oracle(lengths: Floats) -> list[PredictedLength]:
    return [PredictedLength(length, length) for length in lengths.tolist()]


def _constant(lengths: Floats) -> list[PredictedLength]:
    return [PredictedLength(float(np.median(lengths)), float(np.quantile(lengths, 0.9)))] * len(lengths)


def _reversed(lengths: Floats) -> list[PredictedLength]:
    """Only the order is wrong: the predictions are a permutation of the true lengths."""
    predicted = np.empty(len(lengths))
    predicted[np.argsort(lengths, kind="stable")] = np.sort(lengths)[::-1]
    p90 = float(np.quantile(lengths, 0.9))
    return [PredictedLength(tokens, max(tokens, p90)) for tokens in predicted.tolist()]


_WITHOUT_PARAMETER: dict[str, Callable[[Floats], list[PredictedLength]]] = {
    "oracle": _oracle,
    "constant": _constant,
    "reversed": _reversed,
}


def _noisy(lengths: Floats, sigma: float, random: np.random.Generator) -> list[PredictedLength]:
    errors = np.exp(random.normal(0.0, sigma, len(lengths)))
    p90 = math.exp(_Z90 * sigma)
    return [PredictedLength(max(1.0, tokens), max(1.0, tokens * p90)) for tokens in (lengths * errors).tolist()]


def _shipped(lengths: Floats, factor: float, random: np.random.Generator) -> list[PredictedLength]:
    """Return predictions with the shipped model's errors in rank, on this workload's scale, times ``factor``.

    A length at rank u of the workload gets the error of a held-out answer near rank u. If the model's p50 for that
    answer is at rank v of the held-out lengths, the prediction is the workload's v quantile. For lengths like those of
    the training data, that is the measured error. For others, it is the error of a model calibrated to their scale.
    """
    with np.load(SHIPPED) as held_out:
        by_length = np.argsort(held_out["length"], kind="stable")
        actual, p50, p90 = (held_out[key][by_length].astype(np.float64) for key in ("length", "p50", "p90"))
    n, answers = len(lengths), len(actual)
    rank = np.empty(n)
    rank[np.argsort(lengths, kind="stable")] = (np.arange(n) + 0.5) / n
    neighbour = rank * answers + random.uniform(-_NEIGHBOURS, _NEIGHBOURS, n) * answers
    chosen = np.clip(neighbour.astype(int), 0, answers - 1)

    def rescaled(predicted: Floats) -> list[float]:
        tokens: list[float] = (np.quantile(lengths, np.searchsorted(actual, predicted) / answers) * factor).tolist()
        return tokens

    pairs = zip(rescaled(p50[chosen]), rescaled(p90[chosen]), strict=True)
    return [PredictedLength(max(1.0, tokens), max(1.0, tokens, upper)) for tokens, upper in pairs]


def _number(text: str, below: float) -> float | None:
    """Return ``text`` as a number in [0, ``below``), or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < below else None
