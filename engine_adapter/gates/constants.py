"""The constants of the `slack` policy, its step gate and best-effort preemption."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlackConstants:
    """Each with its meaning, unit and evidence. "Ablation" is docs/results/slack_study.md, simulated, five seeds."""

    best_effort_share: float = 0.05
    """Share of steps, and of slots, that best-effort requests have however full the engine is. A stated guarantee."""

    peak_window_s: float = 10.0
    """Seconds for which room that paced requests used is kept for them. Preempted requests are computed again from
    their prompt, which takes seconds, so they must not return for a moment. By convention."""

    min_prefill_share: float = 0.02
    """Least share of time assumed to be left for prefill. Decodes end, so prefill never stops. By convention."""

    e2e_pace_factor: float = 1.5
    """A request with an end-to-end bound is planned with this multiple of the pace that the bound left at admission.
    Steps turn out shorter than that pace, as each later request is checked against its own. 1.0 loses 7% of goodput at
    2 S and 3 S on the code-and-chat workload (ablation); all values from 1.5 to 20 do the same on mixes."""

    max_hold_s: float = 0.15
    """Seconds that a slow decision may be held, at most: a rejected client should know soon. By convention."""

    fair_share_window: int = 100
    """Decided requests of a group that its admitted share is averaged over. By convention: a percent is one request."""

    max_fair_share_groups: int = 1000
    """Classes and tenants that are remembered; the least recent are forgotten first. Bounds memory."""

    @property
    def steps_per_turn(self) -> int:
        """Best-effort requests take part in at least one step in so many."""
        return round(1 / self.best_effort_share)


SLACK = SlackConstants()
