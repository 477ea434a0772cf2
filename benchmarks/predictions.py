"""The output lengths that a simulated gateway is told: from an oracle, with noise, with a real predictor's errors.

oracle          the true length
noise:SIGMA     the true length times exp(N(0, SIGMA))
constant        the workload's median for everybody
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.workload import Asked
from benchmarks.workload.lengths import DATA

Floats = NDArray[np.float64]

SHIPPED = DATA / "shipped_predictor.npz"
"""Lengths of held-out answers and what the shipped model said of them (`benchmarks.make_predictor_errors`)."""

_Z90 = 1.2815515655446004
"""The 90th percentile of the standard normal distribution."""

_NEIGHBOURS = 0.01
"""A request errs as some held-out answer of about its own rank does, at most this share of all answers away."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """A predicted output length and its 90th percentile (tokens)."""

    tokens: float
    p90: float


def predict(how: str, workload: Sequence[Asked], seed: int) -> list[Predicted]:
    """A prediction for each request of ``workload``; the same ``seed`` gives the same errors.

    Raises:
        ValueError: no such predictor; the message lists them.
    """
    if not workload:
        return []
    lengths = np.array([asked.output_tokens for asked in workload], dtype=float)
    kind, _, parameter = how.partition(":")
    if kind == "oracle" and not parameter:
        return [Predicted(length, length) for length in lengths.tolist()]
    if kind == "constant" and not parameter:
        return [Predicted(float(np.median(lengths)), float(np.quantile(lengths, 0.9)))] * len(lengths)
    if kind == "noise":
        sigma = _sigma(parameter)
        errors = np.exp(np.random.default_rng([seed, 0x9E37]).normal(0.0, sigma, len(lengths)))
        p90 = math.exp(_Z90 * sigma)
        return [Predicted(max(1.0, tokens), max(1.0, tokens * p90)) for tokens in (lengths * errors).tolist()]
    if kind == "shipped" and not parameter:
        return _as_shipped(lengths, np.random.default_rng([seed, 0x51E9]))
    raise ValueError(
        f"no predictor is called {how!r}; choose shipped, oracle, noise:SIGMA (such as noise:0.5) or constant"
    )


def _as_shipped(lengths: Floats, random: np.random.Generator) -> list[Predicted]:
    """The shipped model's errors in rank, on this workload's own scale.

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
        found: list[float] = np.quantile(lengths, np.searchsorted(actual, predicted) / known).tolist()
        return found

    pairs = zip(on_scale(p50[alike]), on_scale(p90[alike]), strict=True)
    return [Predicted(max(1.0, tokens), max(1.0, tokens, upper)) for tokens, upper in pairs]


def _sigma(text: str) -> float:
    try:
        sigma = float(text)
    except ValueError:
        sigma = math.nan
    if not 0 <= sigma < 10:
        raise ValueError(f"noise:SIGMA needs a number from 0 to 10, such as noise:0.5, but got {text!r}")
    return sigma
