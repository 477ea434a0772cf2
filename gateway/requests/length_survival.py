"""The expected length of an answer, given that it is already longer than g tokens.

The length L is modelled as log-normal through the two predicted quantiles,

    mu = ln p50,    sigma = ln(p90 / p50) / z,    z = Phi^-1(0.9) = 1.2816,
    S(g) = P(L > g) = 1 - Phi((ln g - mu) / sigma),

so the q-quantile of the answers longer than g tokens is where S has fallen to (1 - q) S(g):

    Q(q | L > g) = exp(mu - sigma * Phi^-1((1 - q) S(g))).

So an answer that reaches its p50 is expected to become as long as the 0.75 quantile of all answers.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()
_Z90 = _NORMAL.inv_cdf(0.9)

_LEAST_SURVIVAL = 1e-300
"""Smallest survival probability: below it the inverse of Phi is not finite."""


def surviving_quantile(q: float, generated: float, p50: float, p90: float) -> float:
    """Return Q(q | L > ``generated``) in tokens, of an answer predicted at ``p50`` and ``p90`` tokens.

    The result is at least ``generated + 1``. If ``p90`` is at most ``p50``, it is the larger of that and ``p50``.
    """
    least = generated + 1.0
    if p90 <= p50 or p50 <= 0.0:
        return max(p50, least)
    sigma = math.log(p90 / p50) / _Z90
    survival = 1.0
    if generated > 0.0:
        survival = 0.5 * math.erfc((math.log(generated) - math.log(p50)) / sigma / math.sqrt(2.0))
    deeper = max((1.0 - q) * survival, _LEAST_SURVIVAL)
    return max(p50 * math.exp(-sigma * _NORMAL.inv_cdf(deeper)), least)
