"""When to ask the policy for its next decision."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision
from gateway.requests.request import Request

MAX_DECIDING_SHARE = 0.008
"""Maximum share of wall time spent deciding while requests wait. Slow policies run less often, but never less often
than the engine needs (`Decision.max_hold_s`). At 1 ms a decision this is about one percent with all that surrounds it."""


@dataclass(slots=True)
class DecisionSchedule:
    """Decides when the next decision is due. Times are monotonic seconds; it reads no clock.

    A decision is due after a change that may matter: an arrival that fits, a first token, an end, the engine's return.
    While the latest decision *holds*, changes wait until the hold ends. It holds only while requests wait and the
    engine is busy: an idle engine, or an arrival that finds an empty queue, never waits.
    """

    due_s: float = -math.inf
    _held_until_s: float = -math.inf
    _latest: Decision = field(default_factory=Decision)

    def on_arrival(self, request: Request, alone: bool) -> None:
        """``request`` was queued; ``alone``: no other one waits."""
        if alone:
            self._held_until_s = -math.inf
        # If a change has already made a decision due, `fits` may be out of date; but then nothing is left to do here.
        if self.due_s > self._held_until_s and self._latest.fits(request):
            self.due_s = self._held_until_s

    def on_change(self, busy: bool) -> None:
        """A request began its answer, ended or was withdrawn, or the engine came or went.

        ``busy``: requests wait and the engine has work.
        """
        if not busy:
            self._held_until_s = -math.inf
        self.due_s = self._held_until_s

    def is_due(self, now: float) -> bool:
        """Whether to decide at ``now``, if any request waits."""
        return now >= self.due_s

    def on_decision(self, now: float, decision: Decision, *, busy: bool, final: bool) -> None:
        """``decision`` was applied at ``now``. Not ``final``: it changed what waits, so decide again soon."""
        self._latest, self._held_until_s = decision, -math.inf
        self.due_s = now + MAX_DECISION_INTERVAL_S
        if decision.recheck_at is not None:
            self.due_s = min(self.due_s, decision.recheck_at)
        if final:
            self._hold(now + decision.hold_s, busy)

    def on_cost(self, now: float, seconds: float, busy: bool) -> None:
        """The latest decision took ``seconds`` of computing; hold it so that deciding stays within its share of time."""
        self._hold(now + min(seconds / MAX_DECIDING_SHARE, self._latest.max_hold_s), busy)

    def _hold(self, until_s: float, busy: bool) -> None:
        if busy:
            self._held_until_s = max(self._held_until_s, until_s)
            self.due_s = max(self.due_s, self._held_until_s)
