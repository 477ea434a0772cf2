"""How many engines the traffic of the last minutes needs. `antares serve` runs this module as a process of its own.

The process reads one JSON document from stdin (`Traffic.of`) and writes one to stdout (`Answer.document`). It has the
lowest priority, and a limit on its CPU time.

The answer is the fewest engines with which the requests attain ``target``, found by simulation. Requests that an idle
engine cannot attain do not count, since no number of engines helps them. Of many requests, only `MAX_SIMULATED` are
simulated: a sample at the rate f, for which n engines are the fewest. Then the highest f that n engines hold is found,
and the answer is n/f.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine_adapter.step_time.profile import Profile, parse_profile
from gateway.policies.registry import make_policy
from lab.records.run_record import RequestResult
from lab.simulate.predictions import PredictedLength
from lab.simulate.replica_search import IDLE, fewest, is_feasible
from lab.simulate.simulator import simulate
from lab.simulate.step_jitter import USUAL_JITTER
from lab.workload import WorkloadRequest

MAX_SIMULATED = 3000
"""Most requests of one simulation: about 3 s of CPU time, and an adherence of 99% within 0.2% (one standard error)."""

MAX_CPU_S = 120
"""CPU time (s) after which the operating system ends the process. Usually it takes 5 to 20 s."""

_PRECISION = 1.08
"""Factor to which the rate of a sample that some engines hold is found."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in order of arrival, and the engines and settings that serve them.

    Attributes:
        requests, predictions: with their output lengths, and the predicted ones.
        profiles: of the engines; engine i gets the one at i modulo their number.
        policy, options, routing: as in the configuration of the gateway.
        target: share of the requests that must attain their SLO.
        first, most: number of engines to try first, and at most.
    """

    requests: Sequence[WorkloadRequest]
    predictions: Sequence[PredictedLength]
    profiles: Sequence[Profile]
    policy: str = "slack"
    options: dict[str, Any] = field(default_factory=dict)
    routing: str = "least_load"
    target: float = 0.99
    first: int = 1
    most: int = 64

    @classmethod
    def of(cls, document: dict[str, Any]) -> Traffic:
        """Return the traffic of a JSON document.

        Its ``requests`` are lists: arrival (s), prompt and output tokens, TTFT, TPOT and end-to-end bound (s or null),
        predicted tokens, their 90th percentile, and whether it is served without its bounds if they cannot be met.
        """
        rows = sorted(document["requests"], key=lambda row: float(row[0]))
        shortest = min(profile["max_model_len"] for profile in document["profiles"])
        requests, predictions = [], []
        for at, prompt_tokens, output_tokens, ttft, tpot, e2e, predicted, p90, best_effort in rows:
            prompt = max(1, min(int(prompt_tokens), shortest - 1))
            output = max(1, min(int(output_tokens), shortest - prompt))
            bounds = [math.inf if bound is None else bound for bound in (ttft, tpot, e2e)]
            requests.append(
                WorkloadRequest(at, prompt, output, bounds[0], bounds[1], 1, bounds[2], best_effort=best_effort)
            )
            predictions.append(PredictedLength(max(1.0, predicted), max(1.0, predicted, p90)))
        settings = {key: value for key, value in document.items() if key not in ("requests", "profiles")}
        return cls(requests, predictions, [parse_profile(profile) for profile in document["profiles"]], **settings)


@dataclass(slots=True)
class Answer:
    """The number of engines that are wanted.

    Attributes:
        wanted: at least 1, and at most ``Traffic.most``.
        requests: number of requests in the estimate.
        infeasible: number of requests whose bounds an idle engine cannot attain. They are not in ``requests``.
        sampled: share of the requests that were simulated.
        tried: number of engines to adherence, of the sample if ``sampled`` is below 1.
        saturated: more engines do not help, although the target is not attained.
        held: whether the target is attained, or ``saturated``.
        cpu_s: CPU time of the simulations (s).
    """

    wanted: int
    requests: int = 0
    infeasible: int = 0
    sampled: float = 1.0
    tried: dict[int, float] = field(default_factory=dict)
    saturated: bool = False
    held: bool = True
    cpu_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return the answer as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}


def wanted_replicas(traffic: Traffic) -> Answer:
    """Return how many engines ``traffic`` needs."""
    started = time.process_time()
    feasible = [is_feasible(request, traffic.profiles) for request in traffic.requests]
    answer = Answer(1, requests=sum(feasible), infeasible=len(feasible) - sum(feasible))
    if answer.requests:
        _Search(traffic, np.array(feasible), answer).run()
    answer.cpu_s = round(time.process_time() - started, 2)
    return answer


class _Search:
    """Searches the engines for ``traffic``, and notes in ``answer`` what it tried."""

    def __init__(self, traffic: Traffic, feasible: np.ndarray[Any, np.dtype[np.bool_]], answer: Answer) -> None:
        self._traffic, self._feasible, self._answer = traffic, feasible, answer
        # The same requests are in every sample of a higher rate.
        self._rank = np.random.default_rng(0).random(len(feasible))

    def run(self) -> None:
        """Set the number of engines in the answer."""
        traffic, answer = self._traffic, self._answer
        answer.sampled = share = min(1.0, MAX_SIMULATED / len(traffic.requests))
        most = max(1, math.ceil(traffic.most * share))
        first = min(max(1, round(traffic.first * share)), most)
        needed = fewest(lambda engines: self._keeps(engines, share), first, 1, most)
        answer.held = needed is not None
        if needed is None or share == 1.0:
            answer.wanted = traffic.most if needed is None else needed
            return
        low, high = share, min(1.0, share * needed / (needed - 1)) if needed > 1 else min(1.0, 2 * share)
        while high / low > _PRECISION:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._keeps(needed, middle, note=False) else (low, middle)
        answer.wanted = min(traffic.most, max(1, math.ceil(needed / math.sqrt(low * high))))

    def _keeps(self, engines: int, share: float, note: bool = True) -> bool:
        traffic, answer = self._traffic, self._answer
        chosen: list[int] = np.flatnonzero(self._rank < share).tolist()
        result = simulate(
            [traffic.requests[at] for at in chosen],
            [traffic.predictions[at] for at in chosen],
            traffic.profiles,
            lambda: make_policy(traffic.policy, dict(traffic.options)),
            replicas=engines,
            routing=traffic.routing,
            step_jitter=USUAL_JITTER,
        )
        counted = [one for one, at in zip(result.results, chosen, strict=True) if self._feasible[at]]
        measured = _adherence(counted)
        if note:
            answer.tried[engines] = round(measured, 4)
        if measured >= traffic.target:
            return True
        idle = result.busy_s < IDLE * engines * result.duration_s
        answer.saturated |= idle
        return idle


def _adherence(results: Sequence[RequestResult]) -> float:
    return sum(result.attained for result in results) / len(results) if results else 1.0


def main() -> None:
    """Answer the question on stdin."""
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    json.dump(wanted_replicas(Traffic.of(json.load(sys.stdin))).document(), sys.stdout)


if __name__ == "__main__":
    main()
