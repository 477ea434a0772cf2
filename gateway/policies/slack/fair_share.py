"""`min_admission_share`: SLO classes and tenants that expensive requests would keep from being served go first.

Of the requests that were decided recently, a share A was admitted; of those of a group g (an SLO class or a tenant) a
share A_g. The group is *behind* while

    A_g < min_admission_share * A,

and its requests then go first. So a group that keeps asking is admitted at `min_admission_share` times the overall
rate, as far as its deadlines can be met and the paces of running requests allow. It does not wait for a group's
request that does not fit yet: other requests still pass it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine_adapter.gates.constants import SLACK
from gateway.policies.base import Decision
from gateway.requests.request import Request

_MAX_WEIGHT = 1e9
"""Weight of one decision at which all counts are scaled down, before floating point loses the small ones."""


@dataclass(slots=True)
class _Counts:
    """Admitted and decided requests of a group; older decisions weigh less."""

    admitted: float = 0.0
    decided: float = 0.0

    @property
    def share(self) -> float:
        return self.admitted / self.decided if self.decided else 1.0


@dataclass(slots=True)
class FairShare:
    """Counts decisions by class and tenant. With ``min_admission_share`` 0 it counts nothing."""

    min_admission_share: float
    _all: _Counts = field(default_factory=_Counts)
    _classes: dict[str, _Counts] = field(default_factory=dict)
    _tenants: dict[str, _Counts] = field(default_factory=dict)
    _weight: float = 1.0

    def note(self, decision: Decision) -> None:
        """Count the decided requests; best effort and infeasible ones are not a question of fairness."""
        if self.min_admission_share <= 0:
            return
        for request in decision.admit:
            if not request.best_effort:
                self._count(request, 1.0)
        for rejection in decision.reject:
            if not rejection.infeasible:
                self._count(rejection.request, 0.0)

    def behind(self, requests: Sequence[Request]) -> list[bool] | None:
        """Return which requests belong to a group that is behind; None when no group is."""
        least = self.min_admission_share * self._all.share
        classes = {name for name, counts in self._classes.items() if counts.share < least}
        tenants = {name for name, counts in self._tenants.items() if counts.share < least}
        if not classes and not tenants:
            return None
        return [request.slo_class in classes or request.tenant in tenants for request in requests]

    def _count(self, request: Request, admitted: float) -> None:
        # A growing weight of new decisions has the effect of all older ones shrinking.
        self._weight *= 1 + 1 / SLACK.fair_share_window
        for groups, name in ((self._classes, request.slo_class), (self._tenants, request.tenant)):
            # Inserted again at the end, so that the first group is the least recent one.
            groups[name] = groups.pop(name) if name in groups else _Counts()
            if len(groups) > SLACK.max_fair_share_groups:
                del groups[next(iter(groups))]
        for counts in (self._all, self._classes[request.slo_class], self._tenants[request.tenant]):
            counts.decided += self._weight
            counts.admitted += admitted * self._weight
        if self._weight > _MAX_WEIGHT:
            for counts in (self._all, *self._classes.values(), *self._tenants.values()):
                counts.decided /= self._weight
                counts.admitted /= self._weight
            self._weight = 1.0
