"""Service level objectives: the bounds of a request, and which of them it violated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Bound = Literal["ttft", "tpot", "e2e"]


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper bounds in seconds; None leaves that quantity unbounded.

    ``ttft_s``: arrival to first output token. ``tpot_s``: mean time per output token after the first.
    ``e2e_s``: arrival to last token. ``from_class``: the bounds that the request did not set, but its class did.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    from_class: frozenset[Bound] = field(default=frozenset(), compare=False)

    def violated(self, ttft_s: float | None, tpot_s: float, e2e_s: float) -> tuple[Bound, ...]:
        """Return the bounds that a finished request violated. An unobserved first token violates a TTFT bound."""
        violated: list[Bound] = []
        if self.ttft_s is not None and (ttft_s is None or ttft_s > self.ttft_s):
            violated.append("ttft")
        if self.tpot_s is not None and tpot_s > self.tpot_s:
            violated.append("tpot")
        if self.e2e_s is not None and e2e_s > self.e2e_s:
            violated.append("e2e")
        return tuple(violated)


@dataclass(frozen=True, slots=True)
class SloClass:
    """A named default SLO, the limit of its queue, and what happens to requests that cannot attain their SLO."""

    name: str
    slo: Slo
    max_waiting: int = 1024
    on_unattainable: Literal["reject", "best_effort"] = "reject"
