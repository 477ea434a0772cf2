"""Paces that are all but the engine's own: where they cost more answers than they bring, they are held off.

While anybody runs whose TPOT bound is P, no step takes longer than P. A bound is *dear* where a step with a single
decode in it, T_0, already takes most of that:

    T_0 > DEAR * P.

Whoever runs beside such a request has to share what is left of P, so that a few of them can keep out many. Of what was
decided on lately, let a share A have been admitted, and let a share F not be dear. Without the dear ones all of F might
be served, so they are held off as soon as

    A < WORTH * F,

until for ``QUIET_S`` nobody else has had to wait. On an engine for which no bound is dear, nothing of this happens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.policies.base import Decision
from gateway.policies.floor import MEMORY
from gateway.request import Request

DEAR = 0.75
WORTH = 0.8
"""Below 1: F is the most that can be hoped for, and a class is a lot to lose."""

QUIET_S = 3.0

_LEAST_KNOWN = 100
"""Decisions without which nothing is known of A and F."""


@dataclass(slots=True)
class DearPace:
    """``held_off``: whether requests with bounds under ``below_s`` (s), which are dear now, are."""

    held_off: bool = False
    below_s: float = 0.0
    _admitted: float = 0.0
    _others: float = 0.0
    _known: int = 0
    _waited_s: float = -math.inf

    def look(self, now: float, alone_s: float) -> None:
        """Decide whether to hold off; a step with one decode in it takes ``alone_s``."""
        self.below_s = alone_s / DEAR
        if not self.held_off:
            self.held_off = self._known >= _LEAST_KNOWN and self._admitted < WORTH * self._others
        elif now - self._waited_s > QUIET_S:
            self.held_off, self._known, self._admitted, self._others = False, 0, 0.0, 0.0

    def note(self, decision: Decision) -> None:
        """Count what was decided; what came longer ago counts for less."""
        for request in decision.admit:
            self._count(request, admitted=True)
        for rejection in decision.reject:
            if not rejection.hopeless:
                self._count(rejection.request, admitted=False)

    def others_wait(self, now: float) -> None:
        """Somebody waits whose bound is not dear."""
        self._waited_s = now

    def _count(self, request: Request, *, admitted: bool) -> None:
        keep = 1 - 1 / MEMORY
        bound = request.tpot_slo_s
        dear = bound is not None and bound < self.below_s and not request.best_effort
        self._admitted = self._admitted * keep + admitted
        self._others = self._others * keep + (not dear)
        self._known += 1
