"""An experiment: annealing's order on top of `slack`'s feasible set.

`slack` decides rejections and feasibility. Only the order of the feasible requests changes:

- ``order``: annealing plans the feasible requests, and they are tried in the order of the plan;
- ``set``: only the first batch of the plan is tried, so that annealing also decides how many are admitted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from engine_adapter.engine import EngineState
from engine_adapter.service_kind import ServiceKind
from gateway.policies.annealing.policy import Annealing
from gateway.policies.base import Decision
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request


@dataclass(slots=True)
class AnnealingOnSlack:
    """``mode`` is ``order`` or ``set``. With fewer than two feasible requests, `slack` decides alone.

    INVARIANT: `slack` decides each admission, one request at a time in annealing's order, so its invariant holds.
    """

    mode: str = "order"
    name: str = "annealing_on_slack"
    gate: str = "slack"
    slack: Slack = field(default_factory=Slack)
    annealing: Annealing = field(default_factory=lambda: Annealing(reject=False))

    def order(self, request: Request) -> tuple[float, ...]:
        """The order of `slack`."""
        return self.slack.order(request)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Admit, in annealing's order, requests that `slack` accepts; reject what `slack` rejects."""
        bounded = [r for r in waiting if r.kind is not ServiceKind.BEST_EFFORT]
        if len(bounded) < 2:
            return self.slack.decide(now, waiting, running, engine)
        plain = self.slack.decide(now, waiting, running, engine)
        rejected = {id(rejection.request) for rejection in plain.reject}
        left = [r for r in bounded if id(r) not in rejected]
        if len(left) < 2 or len(plain.admit) == len(left):
            return plain
        first = self.annealing.first_batch(now, left, running, engine)
        decision = Decision(reject=plain.reject, recheck_at=plain.recheck_at)
        batch = list(running)
        for request in first if self.mode == "set" else [*first, *(r for r in plain.admit if r not in first)]:
            # One request per decision, so that the order is annealing's.
            single = Slack.decide(_without_rejections(self.slack), now, [request], batch, engine)
            if single.admit:
                decision.admit.append(request)
                decision.paces |= single.paces
                batch.append(request)
        return decision


def _without_rejections(slack: Slack) -> Slack:
    """`slack` without rejections for lateness and without fair shares, which were decided on the whole queue."""
    return replace(slack, min_admission_share=0.0, max_wait_s=math.inf, queue_discount=0.0)
