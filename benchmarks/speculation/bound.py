"""The largest gain in capacity that speculative decoding can bring on an engine: steady states of full batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from engine_adapter.step_time.profile import Profile, load_profile
from lab.workload import WorkloadRequest, make_workload

PACE_S = 0.03
"""The strictest pace of SCORPIO's six categories for this model."""
BATCH_STEP = 8
"""Interval between the batch sizes that are tried, in sequences."""


class SteadyState(NamedTuple):
    """Equal steps that serve ``qps`` requests per second.

    Attributes:
        qps: requests that end per second, and as many that begin.
        drafts: drafts of each decode.
        decodes: decodes per step.
        tokens: tokens that a decode brings per step, on average.
        step_s: seconds of a step, with its part of the prompts.
        decode_s: seconds of a step without prompts.
    """

    qps: float
    drafts: int
    decodes: int
    tokens: float
    step_s: float
    decode_s: float


def steady_state(
    profile: Profile, workload: list[WorkloadRequest], drafts: Iterable[int], acceptance: float
) -> SteadyState:
    """Return the steady state with the most requests per second, if every decode has one of the numbers of ``drafts``.

    A decode brings g = 1 + r + ... + r^k tokens per step, for k drafts of acceptance r. So D * g / y of D requests with
    y tokens end in each step, and as many prompts are computed. A step may take g paces. No queue, no variation and no
    policy can serve more, on average, with equal drafts for all.

    Raises ValueError if the steps of the smallest batch take longer than that.
    """
    prompt = sum([request.prompt_tokens for request in workload]) / len(workload)
    output = sum([request.output_tokens for request in workload]) / len(workload)
    states = []
    for number in drafts:
        gained = 1 + sum([acceptance**position for position in range(1, number + 1)])
        for decodes in range(BATCH_STEP, profile.max_num_seqs + 1, BATCH_STEP):
            ends, tokens = decodes * gained / output, decodes * (1 + number)
            context = round(decodes * (prompt + output / 2))
            seconds = profile.step_seconds(tokens, context, round(ends * prompt), 0, 1)
            if seconds <= gained * PACE_S:
                alone = profile.step_seconds(tokens, context, 0, 0, 0)
                states.append(SteadyState(ends / seconds, number, decodes, gained, seconds, alone))
    if not states:
        raise ValueError(f"{profile.name}: {BATCH_STEP} decodes take longer than {PACE_S:g} s for a token of each")
    return max(states)


def steady_states(name: str, drafts: int, acceptances: list[float]) -> dict[str, Any]:
    """Return the slots of profile ``name``, and its best steady states.

    The first one has no drafts. The others have 0 to ``drafts`` for each decode, one state for each acceptance.
    """
    profile, workload = load_profile(name), make_workload("sharegpt", qps=50.0, duration_s=100.0, seed=0)
    none = {"acceptance": 0.0} | _rounded(steady_state(profile, workload, [0], 0.0))
    drafted = [
        {"acceptance": acceptance} | _rounded(steady_state(profile, workload, range(drafts + 1), acceptance))
        for acceptance in acceptances
    ]
    return {"slots": profile.max_num_seqs, "best": [none, *drafted]}


def _rounded(state: SteadyState) -> dict[str, float]:
    return {key: round(value, 5) for key, value in state._asdict().items()}
