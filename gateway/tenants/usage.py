"""What each tenant has used since the gateway started: requests by outcome, tokens, and requests beyond its limits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MAX_TENANTS = 500
"""Tenants that are told apart, in the order of their first request. Bounds memory and the labels of metrics, because
keys come and go while the gateway runs."""

OTHER = "(other)"
"""The tenants beyond `MAX_TENANTS`, together."""

OUTCOMES = ("finished", "rejected", "failed", "cancelled", "unscheduled", "refused", "rate_limited")
"""Outcomes of the ledger; a request outside scheduling; one refused before it was accepted (400, 403, 404, 413); one
beyond a limit of its tenant."""


@dataclass(slots=True)
class TenantTotals:
    """The totals of one tenant. ``limited``: requests beyond each of its limits."""

    requests: Counter[str] = field(default_factory=Counter)
    limited: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0


class Usage:
    """The totals by tenant."""

    def __init__(self) -> None:
        self.tenants: dict[str, TenantTotals] = {}

    def of(self, tenant: str) -> TenantTotals:
        """Return the totals of ``tenant``, or of `OTHER` if it is new and there are too many."""
        found = self.tenants.get(tenant)
        if found is None:
            if len(self.tenants) >= MAX_TENANTS:
                tenant = OTHER
            found = self.tenants.setdefault(tenant, TenantTotals())
        return found

    def label(self, tenant: str) -> str:
        """Return what names ``tenant`` in metrics."""
        self.of(tenant)
        return tenant if tenant in self.tenants else OTHER

    def document(self, limit: int) -> dict[str, Any]:
        """Return the totals of the ``limit`` tenants with the most requests; the rest is `OTHER`."""
        ranked = sorted(self.tenants.items(), key=lambda item: -item[1].requests.total())
        named = [(name, usage) for name, usage in ranked if name != OTHER]
        shown, rest = named[:limit], named[limit:]
        rest += [(name, usage) for name, usage in ranked if name == OTHER]
        if rest:
            shown.append((OTHER, _sum([usage for _, usage in rest])))
        return {name: _document(usage) for name, usage in shown}


def _sum(usages: list[TenantTotals]) -> TenantTotals:
    total = TenantTotals()
    for usage in usages:
        total.requests.update(usage.requests)
        total.limited.update(usage.limited)
        total.prompt_tokens += usage.prompt_tokens
        total.output_tokens += usage.output_tokens
    return total


def _document(usage: TenantTotals) -> dict[str, Any]:
    return {
        "requests": {outcome: usage.requests[outcome] for outcome in OUTCOMES if usage.requests[outcome]},
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.output_tokens,
        "limited": dict(usage.limited),
    }
