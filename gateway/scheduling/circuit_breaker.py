"""Decides from an engine's recent responses how many new requests it gets. No clock and no I/O.

An engine that fails *rests*: its circuit opens, and requests go to other engines of their pool. After the rest, one
request probes the engine. If it succeeds, the engine recovers: its share of requests grows for `SLOW_START_S`. If it
fails, the engine rests again, for twice as long.

    closed -> open -> half_open -> recovering -> closed
                ^--------+             |
                ^----------------------+

A closed circuit weighs failures too: an engine that fails sometimes gets fewer requests, since a failed request
leaves at once and makes its engine look idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open", "recovering"]
STATES: tuple[State, ...] = ("closed", "open", "half_open", "recovering")

FAILURES_TO_OPEN = 3
"""Failures in a row that open the circuit. One or two can be chance; convention."""

NO_FAILURES = 0.005
"""Failure rate below which an engine counts as free of failures: about 50 successes after the last one."""

RATE_TO_OPEN, RATE_MEMORY = 0.6, 20
"""Failure rate that opens the circuit, as a moving average over about the last `RATE_MEMORY` responses. An engine that
fails less often is worth its retries."""

FIRST_REST_S = 1.0
"""Duration (s) of the first rest, and of one after a 429 without ``Retry-After``. Each further one is twice as long."""

LONGEST_RETRY_AFTER_S = 60.0
"""Longest ``Retry-After`` (s) of an engine that is honoured. A wrong value must not disable an engine."""

SUSPECT_S = 1.0
"""Seconds for which an engine is avoided after a failure that the request may have caused itself."""

SLOW_START_S, FIRST_SHARE = 10.0, 0.1
"""After a rest, an engine's share of requests grows from `FIRST_SHARE` to 1 within `SLOW_START_S`. Convention."""

PROBE_LIMIT_S = 60.0
"""Seconds after which a probe without a result does not hold back the next one."""


@dataclass(slots=True, eq=False)
class CircuitBreaker:
    """The circuit breaker of one engine. Times are monotonic seconds and do not decrease.

    Attributes:
        max_rest_s: longest rest between two probes.
        state: the current state. An open circuit becomes half-open when a probe is sent.
        back_at: when an open circuit lets a probe through.
        reason: why the circuit opened last.
        opened: how often the circuit opened.
        in_doubt: whether the engine failed lately. If not, `admits` is true, `due_for_probe` and `suspected` are false,
            and `share` is 1.
    """

    max_rest_s: float = 30.0
    state: State = "closed"
    back_at: float = -math.inf
    reason: str = ""
    opened: int = 0
    in_doubt: bool = False
    _rest_s: float = FIRST_REST_S
    _in_a_row: int = 0
    _cut_in_a_row: int = 0
    _rate: float = 0.0
    _since: float = -math.inf
    _probe: str = ""
    _probe_until: float = -math.inf
    _suspect_until: float = -math.inf

    # --- what the router asks -----------------------------------------------------------------------------------------

    def admits(self, now: float) -> bool:
        """Whether a new request may go to the engine: the circuit lets requests through, or is due for a probe."""
        if self.state == "open":
            return now >= self.back_at
        return self.state != "half_open" or now >= self._probe_until

    def due_for_probe(self, now: float) -> bool:
        """Whether the next request should probe the engine."""
        return self.state in ("open", "half_open") and self.admits(now)

    def suspected(self, now: float) -> bool:
        """Whether a request has just failed in a way that may be its own fault."""
        return now < self._suspect_until

    def share(self, now: float) -> float:
        """Return the fraction of the requests placed on this engine that it should keep, above 0 and at most 1."""
        ramp = 1.0
        if self.state == "recovering":
            ramp = min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * (now - self._since) / SLOW_START_S)
        return ramp * max((1 - self._rate) ** 2, FIRST_SHARE)

    def current(self, now: float) -> State:
        """Return the state at ``now``: an engine whose slow start is over is closed."""
        if self.state == "recovering" and now >= self._since + SLOW_START_S:
            return "closed"
        return self.state

    def states(self, now: float) -> dict[str, bool]:
        """Return for every state whether it is the current one."""
        current = self.current(now)
        return {state: state == current for state in STATES}

    # --- what happened ------------------------------------------------------------------------------------------------

    def on_sent(self, request_id: str, now: float) -> None:
        """Note that a request was queued for the engine. It is the probe if one is due."""
        if self.due_for_probe(now):
            self.state, self._probe, self._probe_until = "half_open", request_id, now + PROBE_LIMIT_S

    def on_dropped(self, request_id: str, now: float) -> None:
        """Note that a request ended without telling anything about the engine. If it was the probe, the next one is."""
        if self.state == "half_open" and request_id == self._probe:
            self.state, self.back_at = "open", now

    def on_success(self, sent_at: float, now: float) -> bool:
        """Note that the engine began its response to a request sent at ``sent_at``. Return whether it ended a rest."""
        self._in_a_row = 0
        self._rate -= self._rate / RATE_MEMORY
        if self.state in ("open", "half_open") and sent_at > self._since:
            self.state, self._since, self._rate = "recovering", now, 0.0
            return True
        if self.current(now) == "closed":
            self.state, self._rest_s = "closed", FIRST_REST_S
            if self._rate < NO_FAILURES and not self.suspected(now):
                self.in_doubt, self._rate = False, 0.0
        return False

    def on_completed(self) -> None:
        """Note that the engine completed a response."""
        self._cut_in_a_row = 0

    def on_failure(
        self, reason: str, sent_at: float, now: float, retry_after_s: float | None = None, begun: bool = False
    ) -> bool:
        """Note that the engine failed a request sent at ``sent_at``. Return whether it rests from now on.

        ``retry_after_s``: the engine asked for a rest of this many seconds. ``begun``: its response had begun.
        """
        if self.state == "open" or sent_at < self._since:
            return False
        self.in_doubt = True
        self._in_a_row += not begun
        self._cut_in_a_row += begun
        self._rate += (1 - self._rate) / RATE_MEMORY
        if self.state != "half_open" and retry_after_s is None and not self._too_many():
            return False
        if self.current(now) != "closed":
            # The rest before was not long enough.
            self._rest_s = min(2 * self._rest_s, self.max_rest_s)
        self._open(reason, now, max(self._rest_s, min(retry_after_s or 0.0, LONGEST_RETRY_AFTER_S)))
        return True

    def on_overload(self, sent_at: float, now: float, retry_after_s: float | None) -> bool:
        """Note a 429: the engine is healthy but full, and rests briefly. Return whether it rests from now on."""
        if self.state == "open" or sent_at < self._since:
            return False
        asked = FIRST_REST_S if retry_after_s is None else retry_after_s
        self._open("http_429", now, min(max(asked, FIRST_REST_S), LONGEST_RETRY_AFTER_S))
        return True

    def suspect(self, now: float) -> None:
        """Avoid the engine for a moment: a request failed that may fail on every engine."""
        self.in_doubt, self._suspect_until = True, now + SUSPECT_S

    def _too_many(self) -> bool:
        return max(self._in_a_row, self._cut_in_a_row) >= FAILURES_TO_OPEN or self._rate >= RATE_TO_OPEN

    def _open(self, reason: str, now: float, rest_s: float) -> None:
        self.state, self.reason, self.back_at, self._since = "open", reason, now + rest_s, now
        self._probe, self._in_a_row, self._cut_in_a_row = "", 0, 0
        self.in_doubt = True
        self.opened += 1
