"""What annealing might know that `slack` does not: its order, on top of `slack`'s feasible set. An experiment.

`slack` refuses and bounds as ever; only who goes first among those that fit is decided otherwise:

- ``order``: annealing plans those that fit now, and they are tried in the order of its plan;
- ``set``: only the plan's first batch is tried, so that annealing also decides how many go.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from engine_adapter.engine import EngineState
from gateway.policies.annealing.policy import Annealing
from gateway.policies.base import Decision
from gateway.policies.slack.policy import Slack, is_unbounded
from gateway.requests.request import Request


@dataclass(slots=True)
class AnnealingOnSlack:
    """``mode``: order or set. ``slack`` decides with its own thrift when annealing has no say.

    `slack` sees the queue in slices: first what annealing puts first, then the rest, so that its invariant holds
    throughout and its code stays as it is.
    """

    mode: str = "order"
    name: str = "annealing_on_slack"
    gate: str = "slack"
    slack: Slack = field(default_factory=Slack)
    annealing: Annealing = field(default_factory=lambda: Annealing(reject=False))

    def order(self, request: Request) -> tuple[float, ...]:
        """As `slack`."""
        return self.slack.order(request)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """`slack` says who may go at all; annealing, who of them does and in which order."""
        bounded = [r for r in waiting if not is_unbounded(r)]
        if len(bounded) < 2:
            return self.slack.decide(now, waiting, running, engine)
        plain = self.slack.decide(now, waiting, running, engine)
        refused = {id(rejection.request) for rejection in plain.reject}
        left = [r for r in bounded if id(r) not in refused]
        if len(left) < 2 or len(plain.admit) == len(left):
            return plain
        first = self.annealing.first_batch(now, left, running, engine)
        decision = Decision(reject=plain.reject, recheck_at=plain.recheck_at)
        going = list(running)
        for request in first if self.mode == "set" else [*first, *(r for r in plain.admit if r not in first)]:
            # One at a time, so that the order is annealing's.
            one = Slack.decide(_patient(self.slack), now, [request], going, engine)
            if one.admit:
                decision.admit.append(request)
                decision.paces |= one.paces
                going.append(request)
        return decision


def _patient(slack: Slack) -> Slack:
    """`slack` as it is, but without refusals for lateness or a floor: those were decided on the whole queue."""
    return replace(slack, min_admission_share=0.0, max_wait_s=math.inf, queue_discount=0.0)
