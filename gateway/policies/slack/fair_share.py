"""A floor under overload: whom thrift would turn away altogether still gets a share.

Of the requests decided on lately, a share A was admitted; of those of group g (an SLO class, or a tenant) a share A_g.
A group is *behind* while

    A_g < floor * A,

and its requests then go first. So over any stretch that is long against the memory, a group that keeps asking has at
least ``min_admission_share`` times everybody's chance of being admitted, as far as its deadlines can be met and what
runs can keep
its pace: nobody is kept out for the sake of one that does not fit yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway.policies.base import Decision
from gateway.requests.request import Request

MEMORY = 500
"""Decisions after which one counts for 1/e of the latest."""

MOST_GROUPS = 1000
"""The least recent are forgotten beyond these."""


@dataclass(slots=True, frozen=True)
class Behind:
    """The classes and tenants that are behind. False when there are none."""

    classes: frozenset[str]
    tenants: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.classes or self.tenants)

    def which(self, requests: Iterable[Request]) -> list[bool]:
        """Of each, whether it is of one of them: of all that wait, for which a call each would take long."""
        classes, tenants = self.classes, self.tenants
        return [request.slo_class in classes or request.tenant in tenants for request in requests]


@dataclass(slots=True)
class _Tally:
    """Requests admitted and decided on; older ones count for less."""

    admitted: float = 0.0
    decided: float = 0.0

    def add(self, weight: float, admitted: bool) -> None:
        self.decided += weight
        if admitted:
            self.admitted += weight

    @property
    def share(self) -> float:
        return self.admitted / self.decided if self.decided else 1.0


@dataclass(slots=True)
class FairShare:
    """Who was admitted and who refused lately, by class and by tenant. ``min_admission_share``: a share, 0 for none."""

    min_admission_share: float
    _all: _Tally = field(default_factory=_Tally)
    _classes: dict[str, _Tally] = field(default_factory=dict)
    _tenants: dict[str, _Tally] = field(default_factory=dict)
    _weight: float = 1.0

    def note(self, decision: Decision) -> None:
        """Count what was decided. Best effort has no bound to be fair about."""
        if self.min_admission_share <= 0:
            return
        for request in decision.admit:
            if not request.best_effort:
                self._count(request, admitted=True)
        for rejection in decision.reject:
            if not rejection.infeasible:
                self._count(rejection.request, admitted=False)

    def behind(self) -> Behind:
        """Who is behind now."""
        if self.min_admission_share <= 0:
            return _NOBODY
        least = self.min_admission_share * self._all.share
        return Behind(_below(least, self._classes), _below(least, self._tenants))

    def _count(self, request: Request, *, admitted: bool) -> None:
        # Instead of all the old ones shrinking, each new one weighs a little more.
        self._weight *= 1 + 1 / MEMORY
        self._all.add(self._weight, admitted)
        for tallies, group in ((self._classes, request.slo_class), (self._tenants, request.tenant)):
            # Re-inserted, so that the first is the one that was least recently heard of.
            tally = tallies.pop(group, None) or _Tally()
            tally.add(self._weight, admitted)
            tallies[group] = tally
            if len(tallies) > MOST_GROUPS:
                del tallies[next(iter(tallies))]
        if self._weight > 1e9:
            self._shrink()

    def _shrink(self) -> None:
        for tally in (self._all, *self._classes.values(), *self._tenants.values()):
            tally.admitted /= self._weight
            tally.decided /= self._weight
        self._weight = 1.0


def _below(least: float, tallies: dict[str, _Tally]) -> frozenset[str]:
    return frozenset([group for group, tally in tallies.items() if tally.share < least])


_NOBODY = Behind(frozenset(), frozenset())
