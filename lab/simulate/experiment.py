"""A simulated experiment: workload, engines and length predictor; its runs, and the search for its capacity.

Settings are plain values, so that an experiment can be saved, compared, and sent to another process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from engine_adapter.simulated.speculation import RandomAcceptance
from engine_adapter.step_time.profile import Profile, load_profile
from gateway.policies.base import Policy
from gateway.policies.registry import make_policy
from gateway.requests.slo import SloClass
from lab.bounds import bounds, token_costs
from lab.records.run_record import run_record
from lab.records.timeline import timeline
from lab.simulate.gateway_config import with_classes
from lab.simulate.lifecycle import Changes
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate
from lab.simulate.step_jitter import StepJitter
from lab.workload import WorkloadRequest, make_workload
from lab.workload.trace_replay import PrefixBlocks

MAX_QPS = 4096.0
"""Highest rate (1/s) that `capacity` tries, so that its search ends."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """Settings that all runs of one experiment share.

    Attributes:
        profile: name or file of the step-time profile.
        workload: arguments of `make_workload`, without rate and seed.
        predictor: see `lab.simulate.predictions`.
        limits: engine limits that replace those of the profile, by field name.
        profiles: names or files of further profiles, which the replicas after the first use in turn.
        step_mode, replicas, routing, gateways, learn, colocated_gateway, step_jitter, prefix_caching, prefix_index,
            speculation, changes: see `lab.simulate.simulator.simulate`.
        classes: SLO classes of a gateway, if the categories of the workload are these (`with_classes`).
        timeline_bins: if above 0, records have outcomes over time (`lab.records.timeline`), in as many parts.
    """

    profile: str = "a100-llama3.1-8b"
    workload: dict[str, Any] = field(default_factory=lambda: {"name": "sharegpt", "duration_s": 60.0})
    predictor: str = "shipped"
    step_mode: str = "chunked"
    replicas: int = 1
    routing: str = "least_load"
    gateways: int = 1
    profiles: tuple[str, ...] = ()
    learn: bool = True
    colocated_gateway: bool = False
    limits: dict[str, Any] = field(default_factory=dict)
    step_jitter: StepJitter | None = None
    prefix_caching: bool = True
    prefix_index: bool = True
    speculation: RandomAcceptance | None = None
    timeline_bins: int = 0
    changes: Changes | None = None
    classes: tuple[SloClass, ...] = ()

    def engine(self) -> Profile:
        """Return the profile with ``limits`` applied.

        Raises:
            ValueError: an unknown profile, or KV memory for less than one sequence.
        """
        return self._engine(self.profile)

    def engines(self) -> list[Profile]:
        """Return the profile of each replica. Raises ValueError as `engine` does."""
        kinds = [self._engine(name) for name in (self.profile, *self.profiles)]
        return [kinds[number % len(kinds)] for number in range(self.replicas)]

    def _engine(self, name: str) -> Profile:
        profile = replace(load_profile(name), **self.limits)
        if profile.kv_tokens < profile.max_model_len:
            raise ValueError(
                f"kv_tokens ({profile.kv_tokens}) must hold one sequence of {profile.max_model_len} tokens"
            )
        return profile

    def requests(self, qps: float | None, seed: int) -> list[WorkloadRequest]:
        """Return the workload at ``qps`` (1/s). None keeps the rate of a trace."""
        made = make_workload(qps=qps, seed=seed, **self.workload)
        return with_classes(made, self.classes, self.workload.get("slo_scale", 1.0)) if self.classes else made


@dataclass(frozen=True, slots=True)
class Run:
    """One run of an experiment: a policy (see `parse_policy`), a rate (1/s) and a seed."""

    policy: str
    qps: float | None
    seed: int


def parse_policy(text: str) -> Policy:
    """Return the policy that ``text`` describes, in the form of `policy_spec`.

    Raises:
        ValueError: an unknown policy or option, or an invalid value; the message lists what is accepted.
    """
    spec = policy_spec(text)
    return make_policy(spec["name"], spec["options"])


def policy_spec(text: str) -> dict[str, Any]:
    """Parse ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE`` to ``name`` and ``options``, as in a configuration file.

    Raises:
        ValueError: an option without a value.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"policy options must have the form NAME:OPTION=VALUE,...; {part!r} has no value")
        options[option.strip()] = _value(value.strip())
    return {"name": name.strip(), "options": options}


def _value(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def perform(experiment: Experiment, run: Run, on_ended: Callable[[int], None] = lambda ended: None) -> dict[str, Any]:
    """Simulate ``run`` and return its record (`lab.records.run_record`).

    ``on_ended`` is called with the number of requests that have ended, as in `lab.simulate.simulator.simulate`.

    Raises:
        ValueError: invalid settings, or a workload without requests.
    """
    setup_started = time.perf_counter()
    profiles = experiment.engines()
    workload = experiment.requests(run.qps, run.seed)
    if not workload:
        raise ValueError("the workload has no requests: raise --requests or --duration")
    predictions = predict(experiment.predictor, workload, run.seed)
    started = time.perf_counter()
    result = simulate(
        workload,
        predictions,
        profiles,
        lambda: parse_policy(run.policy),
        step_mode=experiment.step_mode,
        replicas=experiment.replicas,
        routing=experiment.routing,
        gateways=experiment.gateways,
        learn=experiment.learn,
        colocated_gateway=experiment.colocated_gateway,
        step_jitter=experiment.step_jitter,
        prefix_caching=experiment.prefix_caching,
        prefix_index=experiment.prefix_index,
        speculation=experiment.speculation,
        changes=experiment.changes,
        seed=run.seed,
        on_ended=on_ended,
    )
    wall_s = time.perf_counter() - started
    costs = token_costs(profiles[0])
    shares_prefixes = any(request.blocks for request in workload)
    names = {str(request.category): request.slo_class for request in workload if request.slo_class}
    capacity_s = result.duration_s * experiment.replicas
    return run_record(
        run.policy,
        _mean_rate(workload) if run.qps is None else run.qps,
        run.seed,
        result.results,
        result.duration_s,
        wall_s=wall_s,
        scheduling_s=result.scheduling_s,
        bounds=bounds(workload, costs, experiment.replicas) if _has_bounds(profiles, workload) else None,
        routing_s=round(result.routing_s, 4),
        steps=result.steps,
        decisions=result.decisions,
        preemptions=result.preemptions,
        hit_rate=round(result.hit_rate, 4) if shares_prefixes else None,
        predicted_hit_rate=round(result.predicted_hit_rate, 4) if shares_prefixes else None,
        utilisation=round(result.busy_s / capacity_s, 4) if capacity_s else 0.0,
        setup_s=round(started - setup_started, 3),
        **({"class_names": names} if names else {}),
        **({"timeline": timeline(result.results, experiment.timeline_bins)} if experiment.timeline_bins else {}),
    )


def _has_bounds(profiles: Sequence[Profile], workload: Sequence[WorkloadRequest]) -> bool:
    """Whether `lab.bounds` holds: for equal engines. Its sets of a recorded trace's blocks would not fit in memory."""
    return len(set(map(id, profiles))) == 1 and not any(isinstance(r.blocks, PrefixBlocks) for r in workload)


def _mean_rate(workload: Sequence[WorkloadRequest]) -> float:
    """Return the mean arrival rate (1/s); 0 if all requests arrive at the same time."""
    span_s = workload[-1].at_s - workload[0].at_s
    return (len(workload) - 1) / span_s if span_s > 0 else 0.0


def perform_all(experiment: Experiment, runs: Sequence[Run], jobs: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the records of ``runs``, in order, computed by ``jobs`` processes."""
    if jobs <= 1 or len(runs) <= 1:
        yield from (perform(experiment, run) for run in runs)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(perform, [experiment] * len(runs), runs)


def capacity(
    experiment: Experiment,
    policy: str,
    seeds: Sequence[int],
    adherence: float,
    *,
    precision: float = 0.02,
    first_qps: float = 1.0,
    growth: float = 2.0,
    jobs: int = 1,
    on_try: Callable[[float, float], None] = lambda qps, measured: None,
) -> tuple[float, list[dict[str, Any]]]:
    """Return the highest rate (1/s) at which ``policy`` keeps ``adherence``, and the records of all runs of the search.

    Multiplies ``first_qps`` by ``growth`` until adherence falls below the target, or divides it until it does not. Then
    bisects. A rate at which the workload has no request counts as kept.

    Args:
        experiment: the settings of every run.
        policy: see `parse_policy`.
        seeds: adherence is the mean over these seeds.
        adherence: the share of requests that must attain their SLO, from 0 to 1.
        precision: relative precision of the rate.
        first_qps, growth: rate (1/s) of the first try, and factor between tries. A rate close to the result and a small
            factor save runs.
        jobs: number of processes.
        on_try: called with each rate (1/s) tried and the adherence measured there.

    Returns:
        The rate is 0 if the policy does not keep 0.25/s, and `MAX_QPS` if it keeps every rate up to there.
    """
    all_records: list[dict[str, Any]] = []

    def keeps(qps: float) -> bool:
        runs = [Run(policy, qps, seed) for seed in seeds if experiment.requests(qps, seed)]
        if not runs:
            return True
        records = list(perform_all(experiment, runs, jobs))
        all_records.extend(records)
        measured = fmean(record["slo_adherence"] for record in records)
        on_try(qps, measured)
        return measured >= adherence

    low, high = 0.0, first_qps
    while keeps(high):
        low, high = high, high * growth
        if high > MAX_QPS:
            return low, all_records
    while low == 0.0 and high > 1.0 and not keeps(high / growth):
        high /= growth
    if low == 0.0 and high > 1.0:
        low = high / growth
    low = low or 0.25
    if low == 0.25 and not keeps(low):
        return 0.0, all_records
    while high / low > 1 + precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low, all_records


def runs_of(policies: Iterable[str], rates: Iterable[float | None], seeds: Sequence[int]) -> list[Run]:
    """Return a run for each combination of policy, rate and seed, in that order."""
    rates = list(rates)
    return [Run(policy, qps, seed) for policy in policies for qps in rates for seed in seeds]
