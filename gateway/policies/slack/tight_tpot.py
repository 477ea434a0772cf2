"""Paces that are all but the engine's own: where they cost more answers than they bring, they are held off.

While anybody runs whose TPOT bound is P, no step takes longer than P. A bound is *dear* where a step with a single
decode in it, T_0, already takes most of that:

    T_0 > DEAR * P.

Whoever runs beside such a request has to share what is left of P, so that a few of them can keep out many. Of the
bounded requests that were decided on lately, let a share A have been admitted, and let a share F not be dear: that many
might be served without the dear ones. So these are held off as soon as one of them runs and

    A < WORTH * F,

until for ``QUIET_S`` nobody else with bounds has had to wait, or was refused; what was before is then forgotten.
Whether it helped is not looked at: so much overload that F could not be served either holds them off as well. On an
engine for which no bound is dear, nothing of this happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from gateway.policies.base import Decision
from gateway.policies.slack.fair_share import MEMORY
from gateway.requests.request import Request
from gateway.requests.slo import Slo

DEAR = 0.75
WORTH = 0.8
"""Below 1: F is the most that can be hoped for, and a class is a lot to lose."""

QUIET_S = 3.0

_NO_BOUNDS = Slo()

_LEAST_KNOWN = 100
"""Decisions without which nothing is known of A and F."""


@dataclass(slots=True)
class DearPace:
    """``held_off``: whether requests with TPOT bounds under ``below_s`` (s), which are dear now, are."""

    held_off: bool = False
    below_s: float = 0.0
    _admitted: float = 0.0
    _others: float = 0.0
    _known: int = 0
    _waited_s: float = -math.inf

    def has(self, request: Request) -> bool:
        """Whether ``request`` insists on a dear pace."""
        bound = request.slo.tpot_s
        return bound is not None and bound < self.below_s and not request.best_effort

    def which(self, requests: Iterable[Request]) -> list[bool]:
        """Of each, whether it does: of all that run or wait, for which a call each would take long."""
        below_s = self.below_s
        return [r.slo.tpot_s is not None and r.slo.tpot_s < below_s and not r.best_effort for r in requests]

    def look(self, now: float, alone_s: float, running: Iterable[Request]) -> None:
        """Decide whether to hold off. A step with one decode in it takes ``alone_s``; ``running`` are in the engine."""
        self.below_s = alone_s / DEAR
        if now - self._waited_s > QUIET_S:
            self.held_off, self._known, self._admitted, self._others = False, 0, 0.0, 0.0
        elif not self.held_off and self._known >= _LEAST_KNOWN and self._admitted < WORTH * self._others:
            self.held_off = any(self.which(running))

    def note(self, now: float, decision: Decision, left: Iterable[Request]) -> None:
        """Count what was decided; ``left``, who have bounds, were left waiting."""
        self._count(decision.admit, 1.0)
        refused = [rejection.request for rejection in decision.reject if not rejection.infeasible]
        self._count(refused, 0.0)
        if not all(map(self.has, chain(refused, left))):
            self._waited_s = now

    def _count(self, requests: list[Request], admitted: float) -> None:
        # What came longer ago counts for less.
        keep = 1 - 1 / MEMORY
        for request in requests:
            if request.slo != _NO_BOUNDS and not request.best_effort:
                self._admitted = self._admitted * keep + admitted
                self._others = self._others * keep + (not self.has(request))
                self._known += 1
