"""Requests that nobody insists on, there before a workload comes: batch jobs, and a burst that is served late.

What does the workload lose by them, and when are they through? For `benchmarks.slack.study`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lab.records.run_record import RequestResult
from lab.simulate.predictions import PredictedLength, predict
from lab.workload import WorkloadRequest, make_workload

AHEAD_S = 20.0
"""By so much a crowd comes before the workload: it has the engine to itself."""

_CATEGORY = 0
"""Of a crowd's requests; a workload's own begin at 1."""

BATCH, BATCH_PROMPT, BATCH_OUTPUT = 1000, 100, 1000
BURST_QPS, BURST_S = 600.0, 3.0


@dataclass(frozen=True, slots=True)
class Crowd:
    """``make``: its requests, with a seed. ``best_effort``: whoever cannot attain its SLO is served all the same."""

    make: Callable[[int], list[WorkloadRequest]]
    best_effort: bool = False


def _nobody(seed: int) -> list[WorkloadRequest]:
    return []


def _batch(seed: int) -> list[WorkloadRequest]:
    never = math.inf
    return [WorkloadRequest(at * 1e-3, BATCH_PROMPT, BATCH_OUTPUT, never, never, _CATEGORY) for at in range(BATCH)]


def _burst(seed: int) -> list[WorkloadRequest]:
    burst = make_workload("sharegpt", qps=BURST_QPS, duration_s=BURST_S, seed=1000 + seed)
    return [replace(asked, category=_CATEGORY) for asked in burst]


NOBODY = "nobody"

CROWDS = {
    NOBODY: Crowd(_nobody),
    f"{BATCH:,} batch requests": Crowd(_batch),
    f"a burst of {BURST_QPS:g}/s for {BURST_S:g} s, refused": Crowd(_burst),
    "the same burst, at best effort": Crowd(_burst, best_effort=True),
}
"""Crowds by what they are."""


def behind(
    crowd: Crowd, asked: Sequence[WorkloadRequest], predictions: Sequence[PredictedLength], how: str, seed: int
) -> tuple[list[WorkloadRequest], list[PredictedLength]]:
    """``asked`` behind the crowd, whose lengths are predicted as ``how`` says (`lab.simulate.predictions`)."""
    others = crowd.make(seed)
    if not others:
        return list(asked), list(predictions)
    later = [replace(each, at_s=each.at_s + AHEAD_S) for each in asked]
    return others + later, [*predict(how, others, seed), *predictions]


def own(served: Sequence[RequestResult]) -> list[RequestResult]:
    """Those of the workload."""
    return [one for one in served if one.request.category != _CATEGORY]


def crowd_done_s(served: Sequence[RequestResult]) -> float:
    """When the last of the crowd had its last token (s after the start); 0 where none had."""
    ends = [
        one.request.at_s + one.e2e_s for one in served if one.request.category == _CATEGORY and one.e2e_s is not None
    ]
    return max(ends, default=0.0)
