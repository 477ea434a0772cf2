"""The constants of the `slack` policy, its step gate and best-effort preemption."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlackConstants:
    """Each with its meaning, unit and evidence. "Ablation" is docs/results/slack_study.md: simulated, five seeds."""

    best_effort_share: float = 0.05
    """Share of steps, and of slots, that best-effort requests have however full the engine is. A stated guarantee."""

    peak_window_s: float = 10.0
    """Seconds for which room that other requests used is kept for them: computing a preempted request again takes
    seconds. Convention."""

    min_prefill_share: float = 0.02
    """Least share of time that is assumed to be left for prefill. Decodes end, so prefill never stops. Convention."""

    e2e_pace_factor: float = 1.5
    """Multiple of the pace that an end-to-end bound leaves at admission, to plan the running request with. Steps turn
    out shorter than that pace. Ablation: 1.0 loses 7% on the code-and-chat workload; 1.5 to 20 do the same on mixes."""

    max_hold_s: float = 0.15
    """Seconds that a decision may be held after a slow one: a rejected client should know soon. Convention."""

    fair_share_window: int = 100
    """Decided requests of a group that its admitted share is averaged over: one is a percent. Convention."""

    max_fair_share_groups: int = 1000
    """Classes and tenants that are remembered, the most recent ones. Bounds memory."""

    @property
    def steps_per_turn(self) -> int:
        """Requests without a pace take part in at least one step in so many."""
        return round(1 / self.best_effort_share)


SLACK = SlackConstants()
