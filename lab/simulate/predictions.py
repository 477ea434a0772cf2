"""The output lengths that a simulated gateway is told: from an oracle, with noise, with a real predictor's errors.

oracle          the true length
noise:SIGMA     the true length times exp(N(0, SIGMA))
constant        the workload's median for everybody
reversed        the workload's lengths in reverse: whose answer is the longest is told the shortest, and so on
shipped         what the shipped model would say
shipped:FACTOR  the same times FACTOR, as a model would that was trained on shorter answers, or on longer ones
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
"""Lengths of held-out answers and what the shipped model said of them (`benchmarks.predictor.make_errors`)."""

_Z90 = 1.2815515655446004
"""The 90th percentile of the standard normal distribution."""

_NEIGHBOURS = 0.01
"""A request errs as some held-out answer of about its own rank does, at most this share of all answers away."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """A predicted output length and its 90th percentile (tokens)."""

    tokens: float
    p90: float


def predict(how: str, workload: Sequence[WorkloadRequest], seed: int) -> list[Predicted]:
    """A prediction for each request of ``workload``; the same ``seed`` gives the same errors.

    Raises:
        ValueError: no such predictor, or a parameter that it cannot have; the message says what there is.
    """
    if not workload:
        return []
    lengths = np.array([asked.output_tokens for asked in workload], dtype=float)
    if how in _WITHOUT_PARAMETER:
        return _WITHOUT_PARAMETER[how](lengths)
    kind, colon, parameter = how.partition(":")
    if kind == "noise":
        sigma = _number(parameter, 10)
        if sigma is None:
            raise ValueError(f"noise:SIGMA needs a number from 0 to 10, such as noise:0.5, but got {parameter!r}")
        return _noisy(lengths, sigma, np.random.default_rng([seed, 0x9E37]))
    if kind == "shipped":
        factor = _number(parameter, 1000) if colon else 1.0
        if not factor:
            raise ValueError(
                f"shipped:FACTOR needs a number above 0 and below 1000, such as shipped:2, but got {parameter!r}"
            )
        return _as_shipped(lengths, factor, np.random.default_rng([seed, 0x51E9]))
    raise ValueError(
        f"no predictor is called {how!r}; choose shipped, shipped:FACTOR (such as shipped:2), oracle, "
        "noise:SIGMA (such as noise:0.5), constant or reversed"
    )


def _oracle(lengths: Floats) -> list[Predicted]:
    return [Predicted(length, length) for length in lengths.tolist()]


def _constant(lengths: Floats) -> list[Predicted]:
    return [Predicted(float(np.median(lengths)), float(np.quantile(lengths, 0.9)))] * len(lengths)


def _reversed(lengths: Floats) -> list[Predicted]:
    """Wrong about the order alone: lengths and their spread are the workload's own."""
    told = np.empty(len(lengths))
    told[np.argsort(lengths, kind="stable")] = np.sort(lengths)[::-1]
    p90 = float(np.quantile(lengths, 0.9))
    return [Predicted(tokens, max(tokens, p90)) for tokens in told.tolist()]


_WITHOUT_PARAMETER: dict[str, Callable[[Floats], list[Predicted]]] = {
    "oracle": _oracle,
    "constant": _constant,
    "reversed": _reversed,
}


def _noisy(lengths: Floats, sigma: float, random: np.random.Generator) -> list[Predicted]:
    errors = np.exp(random.normal(0.0, sigma, len(lengths)))
    p90 = math.exp(_Z90 * sigma)
    return [Predicted(max(1.0, tokens), max(1.0, tokens * p90)) for tokens in (lengths * errors).tolist()]


def _as_shipped(lengths: Floats, factor: float, random: np.random.Generator) -> list[Predicted]:
    """The shipped model's errors in rank, on this workload's own scale, times ``factor``.

    A length at rank u of the workload errs as a held-out answer near rank u does: if the model put that answer's p50
    at the held-out lengths' rank v, the workload's v quantile is predicted. On the lengths that the model was trained
    for that is its measured error; on others it is the model once calibrated to their scale.
    """
    with np.load(SHIPPED) as held_out:
        by_length = np.argsort(held_out["length"], kind="stable")
        actual, p50, p90 = (held_out[key][by_length].astype(np.float64) for key in ("length", "p50", "p90"))
    n, known = len(lengths), len(actual)
    rank = np.empty(n)
    rank[np.argsort(lengths, kind="stable")] = (np.arange(n) + 0.5) / n
    near = rank * known + random.uniform(-_NEIGHBOURS, _NEIGHBOURS, n) * known
    alike = np.clip(near.astype(int), 0, known - 1)

    def on_scale(predicted: Floats) -> list[float]:
        found: list[float] = (np.quantile(lengths, np.searchsorted(actual, predicted) / known) * factor).tolist()
        return found

    pairs = zip(on_scale(p50[alike]), on_scale(p90[alike]), strict=True)
    return [Predicted(max(1.0, tokens), max(1.0, tokens, upper)) for tokens, upper in pairs]


def _number(text: str, below: float) -> float | None:
    """``text`` as a number of at least 0; None where it is none, or too large."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < below else None
