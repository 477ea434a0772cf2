"""The largest gain in capacity that speculative decoding can bring on an engine: steady states of full batches."""

from __future__ import annotations

from typing import Any

from engine_adapter.step_time.profile import Profile, load_profile
from lab.workload import WorkloadRequest, make_workload

PACE_S = 0.03
"""The strictest pace of SCORPIO's six categories for this model."""
BATCH_STEP = 8
"""Interval between the batch sizes that are tried, in sequences."""


def steady_rate(profile: Profile, workload: list[WorkloadRequest], drafts: int, acceptance: float) -> float:
    """Return the most requests per second of a steady state in which every decode has ``drafts`` drafts.

    A decode brings g = 1 + r + ... + r^k tokens per step, for k drafts of acceptance r. So D * g / y of D requests with
    y tokens end in each step, and as many prompts are computed. A step may take g paces. No queue, no variation and no
    policy can serve more, on average, with equal drafts for all.
    """
    prompt = sum([request.prompt_tokens for request in workload]) / len(workload)
    output = sum([request.output_tokens for request in workload]) / len(workload)
    gained = 1 + sum([acceptance**number for number in range(1, drafts + 1)])
    best = 0.0
    for decodes in range(BATCH_STEP, profile.max_num_seqs + 1, BATCH_STEP):
        ends = decodes * gained / output
        context = round(decodes * (prompt + output / 2))
        seconds = profile.step_seconds(decodes * (1 + drafts), context, round(ends * prompt), 0, 1)
        if seconds <= gained * PACE_S:
            best = max(best, ends / seconds)
    return best


def bounds(name: str, drafts: int, acceptances: list[float]) -> dict[str, Any]:
    """Return for profile ``name`` the steady rate without drafts, and the best one for each acceptance."""
    profile, workload = load_profile(name), make_workload("sharegpt", qps=50.0, duration_s=100.0, seed=0)
    none = steady_rate(profile, workload, 0, 0.0)
    gains = []
    for acceptance in acceptances:
        rate, kept = max([(steady_rate(profile, workload, k, acceptance), k) for k in range(drafts + 1)])
        gains.append({"acceptance": acceptance, "drafts": kept, "gain": round(rate / none, 3)})
    return {"none_qps": round(none, 2), "gains": gains}
