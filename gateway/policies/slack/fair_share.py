"""`min_admission_share`: SLO classes and tenants that expensive requests keep from being served go first.

Of the latest decided requests a share A was admitted; of those of a group g (an SLO class or a tenant) a share A_g. The
group is *behind*, and its requests go first, while

    A_g < min_admission_share * A.

So a group that keeps asking is admitted at `min_admission_share` times the overall rate, as far as its deadlines can be
met and the paces of running requests allow. A request of such a group that does not fit yet blocks no other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine_adapter.gates.constants import SLACK
from gateway.policies.base import Decision
from gateway.requests.request import Request


@dataclass(slots=True)
class _Share:
    """The admitted share of a group's decided requests, as a moving average over `fair_share_window` of them."""

    share: float = 1.0
    decided: int = 0

    def add(self, admitted: bool) -> None:
        self.decided = min(self.decided + 1, SLACK.fair_share_window)
        self.share += (admitted - self.share) / self.decided


@dataclass(slots=True)
class FairShare:
    """Counts decisions by class and tenant. With ``min_admission_share`` 0 no group is ever behind."""

    min_admission_share: float
    _all: _Share = field(default_factory=_Share)
    _classes: dict[str, _Share] = field(default_factory=dict)
    _tenants: dict[str, _Share] = field(default_factory=dict)

    def note(self, decision: Decision) -> None:
        """Count the decided requests; best-effort and infeasible ones are not a question of fairness."""
        decided = [(request, True) for request in decision.admit if not request.best_effort]
        decided += [(rejection.request, False) for rejection in decision.reject if not rejection.infeasible]
        for request, admitted in decided:
            self._all.add(admitted)
            for groups, name in ((self._classes, request.slo_class), (self._tenants, request.tenant)):
                # Inserted again at the end, so that the first group is the least recent one.
                groups[name] = groups.pop(name) if name in groups else _Share()
                groups[name].add(admitted)
                if len(groups) > SLACK.max_fair_share_groups:
                    del groups[next(iter(groups))]

    def behind(self, requests: Sequence[Request]) -> list[bool] | None:
        """Return which requests belong to a group that is behind; None when no group is."""
        least = self.min_admission_share * self._all.share
        classes = {name for name, group in self._classes.items() if group.share < least}
        tenants = {name for name, group in self._tenants.items() if group.share < least}
        if not classes and not tenants:
            return None
        return [request.slo_class in classes or request.tenant in tenants for request in requests]
