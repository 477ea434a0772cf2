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
    longer after a slow decision, unless the engine runs out of prompts. An idle engine and an arrival at an empty queue
    never wait.
    """

    due_s: float = -math.inf
    _held_until_s: float = -math.inf
    _max_hold_s: float = 0.0
    _drained_hold_until_s: float = -math.inf

    def on_change(self, busy: bool) -> None:
        """Note a change: a request arrived, began its response, ended or left, or the engine came up or died."""
        if not busy:
            self._held_until_s = -math.inf
        self.due_s = min(self.due_s, self._held_until_s)

    def on_drained(self) -> None:
        """Note that the engine has no prompt left to prefill, so that waiting longer would waste its time.

        The hold for a step ends, as the step has. The hold for a slow decision shrinks to the time that it took.
        """
        self._held_until_s = min(self._held_until_s, self._drained_hold_until_s)
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
        self._drained_hold_until_s = -math.inf
        self._hold(now + decision.hold_s, busy)

    def on_cost(self, now: float, seconds: float, busy: bool) -> None:
        """Note that the latest decision, of ``now``, took ``seconds`` to compute; hold the next one accordingly."""
        self._hold(now + min(seconds / MAX_DECIDING_SHARE, self._max_hold_s), busy)
        # NOTE: `now` is when it began, so half of the time is left for everything else.
        self._drained_hold_until_s = now + 2 * seconds

    def _hold(self, until_s: float, busy: bool) -> None:
        if busy:
            self._held_until_s = max(self._held_until_s, until_s)
            self.due_s = max(self.due_s, self._held_until_s)
