"""Best-effort requests before or beside a workload, for `benchmarks.slack.study`: batch jobs, documents, or a burst.

The study measures the adherence that the workload loses by them, and when the last of them finishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lab.records.run_record import RequestResult
from lab.simulate.predictions import PredictedLength, predict
from lab.workload import WorkloadRequest, make_workload

LEAD_S = 20.0
"""Seconds from the first background request to the workload; meanwhile the background requests run alone."""

_CATEGORY = 0
"""Category of the background requests; those of a workload begin at 1."""

BATCH, BATCH_PROMPT, BATCH_OUTPUT = 1000, 100, 1000
"""Number of batch requests, and their prompt and output tokens."""

DOCUMENT_PROMPT, DOCUMENT_OUTPUT, DOCUMENT_QPS = 2000, 20, 10.0
"""Prompt and output tokens of the documents, and their rate (1/s): for a minute from the start of the workload."""

BURST_QPS, BURST_S = 600.0, 3.0
"""Rate (1/s) and duration (s) of the burst."""


@dataclass(frozen=True, slots=True)
class Background:
    """Requests that arrive before or beside the workload.

    Attributes:
        make: returns them for a seed.
        best_effort: whether requests that cannot attain their SLO are served as best-effort requests.
    """

    make: Callable[[int], list[WorkloadRequest]]
    best_effort: bool = False


def _none(seed: int) -> list[WorkloadRequest]:
    return []


def _batch(seed: int) -> list[WorkloadRequest]:
    unbounded = math.inf
    return [
        WorkloadRequest(n * 1e-3, BATCH_PROMPT, BATCH_OUTPUT, unbounded, unbounded, _CATEGORY) for n in range(BATCH)
    ]


def _documents(seed: int) -> list[WorkloadRequest]:
    unbounded = math.inf
    return [
        WorkloadRequest(LEAD_S + n / DOCUMENT_QPS, DOCUMENT_PROMPT, DOCUMENT_OUTPUT, unbounded, unbounded, _CATEGORY)
        for n in range(int(60 * DOCUMENT_QPS))
    ]


def _burst(seed: int) -> list[WorkloadRequest]:
    burst = make_workload("sharegpt", qps=BURST_QPS, duration_s=BURST_S, seed=1000 + seed)
    return [replace(request, category=_CATEGORY) for request in burst]


NONE = "none"
BATCH_JOBS = f"{BATCH:,} batch requests"
DOCUMENTS = f"{DOCUMENT_PROMPT:,}-token documents at {DOCUMENT_QPS:g}/s"
BURST_REJECTED = f"a burst of {BURST_QPS:g}/s for {BURST_S:g} s, late requests rejected"
BURST_BEST_EFFORT = "the same burst, late requests best-effort"

BACKGROUNDS = {
    NONE: Background(_none),
    BATCH_JOBS: Background(_batch),
    DOCUMENTS: Background(_documents),
    BURST_REJECTED: Background(_burst),
    BURST_BEST_EFFORT: Background(_burst, best_effort=True),
}
"""The background loads by description."""


def preceded(
    background: Background,
    workload: Sequence[WorkloadRequest],
    predictions: Sequence[PredictedLength],
    predictor: str,
    seed: int,
) -> tuple[list[WorkloadRequest], list[PredictedLength]]:
    """Return ``workload`` with the background requests, in order of arrival, and the predictions of both.

    The lengths of the background requests come from ``predictor`` (`lab.simulate.predictions`).
    """
    first = background.make(seed)
    if not first:
        return list(workload), list(predictions)
    later = [replace(request, at_s=request.at_s + LEAD_S) for request in workload]
    lengths = [*predict(predictor, first, seed), *predictions]
    both = sorted(zip([*first, *later], lengths, strict=True), key=lambda pair: pair[0].at_s)
    return [request for request, _ in both], [length for _, length in both]


def of_workload(results: Sequence[RequestResult]) -> list[RequestResult]:
    """Return the results of the workload's own requests."""
    return [result for result in results if result.request.category != _CATEGORY]


def background_done_s(results: Sequence[RequestResult]) -> float:
    """Return when (s after the start) the last background request got its last token; 0 if none did."""
    ends = [
        result.request.at_s + result.e2e_s
        for result in results
        if result.request.category == _CATEGORY and result.e2e_s is not None
    ]
    return max(ends, default=0.0)
