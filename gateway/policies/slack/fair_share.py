"""`min_admission_share`: requests of SLO classes and tenants that are rarely admitted go first.

Of the latest decided requests a share A was admitted; of those of a group g (a class or a tenant) a share A_g.
The group is *behind* while A_g < min_admission_share * A. Its requests then go first in the admission order, together
with overdue ones. Each engine counts apart. The order follows late rejection and reserves no capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.policies.base import Decision
from gateway.requests.request import Request

_OVERALL = ("", "")  # the group of all requests


@dataclass(slots=True)
class FairShare:
    """Counts decisions by class and tenant. With ``min_admission_share`` 0 no group is ever behind."""

    min_admission_share: float
    _groups: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    """(kind, name) to (admitted share, decided requests): a moving average over `fair_share_window` of them."""

    def note(self, decision: Decision) -> None:
        """Count the decided requests, but no best-effort or infeasible ones. A waived one counts as rejected."""
        decided = [(request, 1.0) for request in decision.admit if request.kind is not ServiceKind.BEST_EFFORT]
        decided += [(rejection.request, 0.0) for rejection in decision.reject if not rejection.infeasible]
        for request, admitted in decided:
            for group in (("class", request.slo_class), ("tenant", request.tenant), _OVERALL):
                share, count = self._groups.pop(group, (1.0, 0))  # and inserted at the end: the most recent group
                count = min(count + 1, SLACK.fair_share_window)
                self._groups[group] = (share + (admitted - share) / count, count)
            while len(self._groups) > SLACK.max_fair_share_groups:
                del self._groups[next(iter(self._groups))]

    def behind(self, requests: Sequence[Request]) -> list[bool]:
        """Return which requests belong to a group that is behind; an empty list when no group is."""
        least = self.min_admission_share * self._groups.get(_OVERALL, (1.0, 0))[0]
        behind = {group for group, (share, _) in self._groups.items() if share < least}
        return [("class", r.slo_class) in behind or ("tenant", r.tenant) in behind for r in requests] if behind else []
