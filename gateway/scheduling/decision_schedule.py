"""When to ask the policy for its next decision."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision

MAX_DECIDING_SHARE = 0.008
"""Maximum share of wall time spent deciding while requests wait. Slow policies run less often, but never less often
than the engine needs (`Decision.max_hold_s`). With the work around a decision this stays below one percent."""


@dataclass(slots=True)
class DecisionSchedule:
    """Says when the next decision is due. Times are monotonic seconds; it reads no clock.

    A decision is due after a change: an arrival, a first token, an end, the engine's return; or when the policy asked
    for it. While the engine is *busy* (requests wait and others run), changes wait for a step (`Decision.hold_s`), and
    longer after a slow decision. An idle engine and an arrival at an empty queue never wait.
    """

    due_s: float = -math.inf
    _held_until_s: float = -math.inf
    _max_hold_s: float = 0.0

    def on_change(self, busy: bool) -> None:
        """Note a change: a request arrived, began its response, ended or left, or the engine came up or died."""
        if not busy:
            self._held_until_s = -math.inf
        self.due_s = min(self.due_s, self._held_until_s)

    def is_due(self, now: float) -> bool:
        """Whether to decide at ``now``, if any request waits."""
        return now >= self.due_s

    def on_decision(self, now: float, decision: Decision, busy: bool) -> None:
        """Note that ``decision`` was applied at ``now``."""
        self._max_hold_s, self._held_until_s = decision.max_hold_s, -math.inf
        self.due_s = now + MAX_DECISION_INTERVAL_S
        if decision.recheck_at is not None:
            self.due_s = min(self.due_s, decision.recheck_at)
        self._hold(now + decision.hold_s, busy)

    def on_cost(self, now: float, seconds: float, busy: bool) -> None:
        """Note that the latest decision took ``seconds`` to compute; hold the next one accordingly."""
        self._hold(now + min(seconds / MAX_DECIDING_SHARE, self._max_hold_s), busy)

    def _hold(self, until_s: float, busy: bool) -> None:
        if busy:
            self._held_until_s = max(self._held_until_s, until_s)
            self.due_s = max(self.due_s, self._held_until_s)
