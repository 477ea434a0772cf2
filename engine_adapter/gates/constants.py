"""The constants of the `slack` policy, its step gate and best-effort preemption."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlackConstants:
    """Each with its meaning, unit and evidence; the ablation is docs/results/slack_study.md."""

    best_effort_share: float = 0.05
    """Least share of steps of requests without a pace, and of slots of best-effort requests. A stated guarantee."""
    peak_window_s: float = 10.0
    """Seconds for which the peak use by other requests stays reserved: recomputing takes seconds. Convention."""
    min_prefill_share: float = 0.02
    """Least share of time assumed to be left for prefill: decodes end, so prefill never stops. Convention."""
    e2e_pace_factor: float = 1.5
    """Multiple of the pace that an end-to-end bound needs, to plan a running request with. Ablation: 1.0 loses 7%."""
    max_hold_s: float = 0.15
    """Seconds that a slow decision may be held, at most: a rejected client should know soon. Convention."""
    fair_share_window: int = 50
    """Decided requests of a class that its admitted share is averaged over: 100 misses a share of 0.8 in 20 s."""

    @property
    def steps_per_turn(self) -> int:
        """N, if requests without a pace take part in at least one step in N."""
        return round(1 / self.best_effort_share)


SLACK = SlackConstants()
