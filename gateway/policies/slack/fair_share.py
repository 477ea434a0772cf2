"""`min_admission_share`: requests of SLO classes that are rarely admitted go first.

Of the latest decided requests a share A was admitted; of those of a class c a share A_c. The class is *behind* while
A_c < min_admission_share * A. Its requests then go first in the admission order, together with overdue ones. Each
engine counts apart. The order follows late rejection and reserves no capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.policies.base import Decision
from gateway.requests.request import Request


@dataclass(slots=True)
class FairShare:
    """Counts decisions by class. With ``min_admission_share`` 0 no class is ever behind."""

    min_admission_share: float
    _classes: dict[str | None, tuple[float, int]] = field(default_factory=dict)
    """Class (None: all) to (admitted share, decided requests): a moving average over `fair_share_window` of them."""

    def note(self, decision: Decision) -> None:
        """Count the decided requests, but no best-effort or infeasible ones. A waived one counts as rejected."""
        decided = [(request, 1.0) for request in decision.admit if request.kind is not ServiceKind.BEST_EFFORT]
        decided += [(rejection.request, 0.0) for rejection in decision.reject if not rejection.infeasible]
        for request, admitted in decided:
            for name in (request.slo_class, None):
                share, count = self._classes.get(name, (1.0, 0))
                count = min(count + 1, SLACK.fair_share_window)
                self._classes[name] = (share + (admitted - share) / count, count)

    def behind(self, requests: Sequence[Request]) -> NDArray[np.bool_]:
        """Return which requests belong to a class that is behind."""
        least = self.min_admission_share * self._classes.get(None, (1.0, 0))[0]
        behind = {name for name, (share, _) in self._classes.items() if share < least}
        rarely = [request.slo_class in behind for request in requests] if behind else [False] * len(requests)
        return np.array(rarely, dtype=np.bool_)
