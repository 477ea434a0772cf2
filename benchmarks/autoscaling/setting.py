"""What `benchmarks.autoscaling.study` simulates: the engine, the target, the intervals and the requests."""

from __future__ import annotations

from dataclasses import dataclass

from lab.simulate.predictions import PredictedLength, predict
from lab.workload import WorkloadRequest, make_workload

PROFILE, POLICY = "a100-llama3.1-8b", "slack"
TARGET = 0.99
"""SLO adherence that the wanted replicas and the search keep."""

WINDOW_S, EVERY_S = 300.0, 150.0
"""Seconds of requests that a signal is computed from, and seconds from one signal to the next."""

COLD_START_S = 60.0
"""Seconds from the start of an engine until it serves."""

STABILISE_S = 300.0
"""Scaling down takes the highest number of this long, as Kubernetes' HorizontalPodAutoscaler does by default."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A trace at ``rate_scale`` times its rate, of which the first ``minutes`` are used."""

    trace: str
    rate_scale: float
    minutes: float
    seed: int

    def traffic(self) -> tuple[list[WorkloadRequest], list[PredictedLength]]:
        """Return the requests and their predicted lengths."""
        workload = make_workload(
            self.trace, arrivals="trace", rate_scale=self.rate_scale, window_s=60 * self.minutes, seed=self.seed,
            max_prompt=7000,
        )  # fmt: skip
        return workload, predict("shipped", workload, self.seed)

    def part(self, start_s: float, end_s: float) -> tuple[list[WorkloadRequest], list[PredictedLength]]:
        """Return the requests that arrive from ``start_s`` to ``end_s``."""
        workload, predictions = self.traffic()
        kept = [at for at, request in enumerate(workload) if start_s <= request.at_s < end_s]
        return [workload[at] for at in kept], [predictions[at] for at in kept]

    @property
    def windows(self) -> list[float]:
        """The starts of the windows (s)."""
        return [WINDOW_S * number for number in range(int(60 * self.minutes // WINDOW_S))]
