"""How many replicas a workload needs: the fewest that keep an SLO adherence, found by simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from engine_adapter.step_time.profile import Profile
from lab.bounds import token_costs
from lab.simulate.experiment import Experiment, Run, perform_all
from lab.workload import WorkloadRequest

MAX_REPLICAS = 1024
"""Most replicas that the search tries, so that it ends."""

IDLE = 0.1
"""Share of time in steps below which more engines do not help: requests miss their bounds for another reason."""

_FULL_STEPS = 1.5
"""Time that a request takes in the steps of a paced engine, over that in full steps. Only the search's start."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """The result of `fewest_replicas`.

    Attributes:
        replicas: the fewest replicas that keep the target; None if the most that may be tried do not.
        records: of all runs (`lab.records.run_record`), each with the number of its ``replicas``.
        tried: number of replicas to mean adherence over the seeds.
        feasible: share of the requests that an idle engine can attain.
        saturated: with ``replicas``, engines mostly idle and the target is not attained. More do not help.
    """

    replicas: int | None
    records: list[dict[str, Any]] = field(default_factory=list)
    tried: dict[int, float] = field(default_factory=dict)
    feasible: float = 1.0
    saturated: bool = False


def fewest_replicas(
    experiment: Experiment,
    policy: str,
    qps: float | None,
    seeds: Sequence[int],
    target: float,
    *,
    first: int | None = None,
    most: int = MAX_REPLICAS,
    jobs: int = 1,
    on_try: Callable[[int, float], None] = lambda replicas, measured: None,
) -> Sizing:
    """Return the fewest replicas of ``experiment`` with which ``policy`` attains at least ``target`` of all requests.

    Adherence is taken to grow with the number of replicas. The search (`fewest`) begins at ``first``, by default at the
    work of the requests (`busy_replicas`).

    Raises:
        ValueError: invalid settings, or a workload without requests.
    """
    kinds = len(experiment.profiles) + 1
    found = Sizing(None)

    def keeps(replicas: int) -> bool:
        runs = [Run(policy, qps, seed) for seed in seeds]
        records = list(perform_all(replace(experiment, replicas=replicas), runs, jobs))
        found.records.extend(record | {"replicas": replicas} for record in records)
        found.tried[replicas] = fmean(record["slo_adherence"] for record in records)
        on_try(replicas, found.tried[replicas])
        if found.tried[replicas] >= target:
            return True
        idle = fmean(record["utilisation"] for record in records) < IDLE
        if idle:
            saturated.append(replicas)
        return idle

    saturated: list[int] = []
    workload, kinds_of_engines = experiment.requests(qps, seeds[0]), replace(experiment, replicas=kinds).engines()
    feasible = sum(is_feasible(request, kinds_of_engines) for request in workload) / max(1, len(workload))
    if first is None:
        first = busy_replicas(experiment, workload)
    needed = fewest(keeps, min(max(first, kinds), most), kinds, most)
    return replace(found, replicas=needed, feasible=feasible, saturated=needed in saturated)


def fewest(keeps: Callable[[int], bool], first: int, least: int, most: int) -> int | None:
    """Return the fewest replicas from ``least`` to ``most`` that ``keeps`` accepts; None if it accepts none of them.

    It accepts every number above one that it accepts. The search begins at ``first``, goes up or down in growing steps
    until the answer is between two of them, and bisects.
    """
    # INVARIANT: ``keeps`` rejects ``low``, which may be below ``least``, and accepts ``high``, which may be above most.
    low, high = least - 1, most + 1
    at, step = first, 1
    while high - low > 1:
        if keeps(at):
            high = at
        else:
            low = at
        if low < least:
            at = max(high - step, least)
        elif high > most:
            at = min(low + step, most)
        else:
            at = (low + high) // 2
        step *= 2
    return high if high <= most else None


def is_feasible(request: WorkloadRequest, profiles: Sequence[Profile]) -> bool:
    """Return whether one of the engines attains the bounds of ``request`` while it is idle and has no prefix of it."""
    for profile in profiles:
        prompt, chunk = request.prompt_tokens, profile.max_num_batched_tokens
        prefill_s = sum(profile.step_seconds(0, 0, min(chunk, prompt - done), done) for done in range(0, prompt, chunk))
        token_s = profile.step_seconds(1, prompt, 0, 0)
        total_s = prefill_s + token_s * (request.output_tokens - 1)
        if prefill_s <= request.ttft_slo_s and token_s <= request.tpot_slo_s and total_s <= request.e2e_slo_s:
            return True
    return False


def busy_replicas(experiment: Experiment, workload: Sequence[WorkloadRequest]) -> int:
    """Return a first guess at the replicas that ``workload`` needs: its work in full steps, per second of arrivals.

    Steps are rarely full, so the guess is low; with shared prefixes it is high.
    """
    if not workload:
        return 1
    costs = token_costs(experiment.engine())
    cost = costs[len(costs) // 2]
    work_s = sum(
        cost.per_prompt_token_s * request.prompt_tokens
        + cost.per_decode_s * request.output_tokens
        + cost.per_context_token_s * request.output_tokens * (request.prompt_tokens + request.output_tokens / 2)
        for request in workload
    )
    return max(1, round(_FULL_STEPS * work_s / max(workload[-1].at_s - workload[0].at_s, 1.0)))
