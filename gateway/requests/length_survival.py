"""How long an answer will be, given how long it is already.

The length L of an answer is taken as log-normal through the two quantiles that were predicted,

    mu = ln p50,    sigma = ln(p90 / p50) / z,    z = Phi^-1(0.9) = 1.2816,
    S(g) = P(L > g) = 1 - Phi((ln g - mu) / sigma),

so that of the answers which survived g tokens the q-quantile lies where S has fallen to (1 - q) S(g):

    Q(q | L > g) = exp(mu - sigma * Phi^-1((1 - q) S(g))).

An answer at its p50 is thus expected to become as long as the 0.75 quantile of all answers: the half that ended earlier
no longer counts. Lengths are roughly log-normal at a given prediction; what is needed of the tail is its shape alone.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()
_Z90 = _NORMAL.inv_cdf(0.9)

_LEAST_SURVIVAL = 1e-300
"""Beyond it the inverse of Phi loses its footing; an answer that long has made the prediction moot."""


def surviving_quantile(q: float, generated: float, p50: float, p90: float) -> float:
    """Q(q | L > ``generated``) in tokens (see the module), of an answer predicted at ``p50`` and ``p90`` tokens.

    Always more than ``generated``, by a token at least: it has not ended. Where ``p90`` tells no spread (at or below
    ``p50``), that and ``p50`` are all there is to say.
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
