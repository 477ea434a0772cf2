"""One simulated experiment: what is asked, of which engines, how well lengths are predicted; and its runs.

Settings are plain values, so that an experiment can be written down, compared, and sent to another process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from engine_adapter.step_time.profile import Profile, load_profile
from gateway.policies.base import Policy
from gateway.policies.registry import make_policy
from lab.bounds import bounds, works
from lab.records.run_record import run_record
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate
from lab.simulate.step_jitter import StepJitter
from lab.workload import WorkloadRequest, make_workload

MOST_QPS = 4096.0
"""`capacity` looks no further."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What stays the same over the runs of one experiment.

    ``workload``: `make_workload`'s arguments but for the rate and the seed. ``limits``: of the engine, where they
    differ from the profile's. ``predictor``: see `lab.simulate.predictions`. ``apart``, ``step_jitter``: see
    `simulate`.
    """

    profile: str = "a100-llama3.1-8b"
    workload: dict[str, Any] = field(default_factory=lambda: {"name": "sharegpt", "duration_s": 60.0})
    predictor: str = "shipped"
    step_mode: str = "chunked"
    replicas: int = 1
    learn: bool = True
    apart: bool = True
    limits: dict[str, Any] = field(default_factory=dict)
    step_jitter: StepJitter | None = None

    def engine(self) -> Profile:
        """The profile, under the limits. ValueError when its KV memory does not hold one sequence."""
        profile = replace(load_profile(self.profile), **self.limits)
        if profile.kv_tokens < profile.max_model_len:
            raise ValueError(
                f"kv_tokens ({profile.kv_tokens}) must hold one sequence of {profile.max_model_len} tokens"
            )
        return profile

    def asked(self, qps: float | None, seed: int) -> list[WorkloadRequest]:
        """The workload at ``qps`` (None: a trace's own rate)."""
        return make_workload(qps=qps, seed=seed, **self.workload)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of an experiment: a policy (`parse_policy`), a rate (1/s), a seed."""

    policy: str
    qps: float | None
    seed: int


def parse_policy(text: str) -> Policy:
    """A policy from what `policy_spec` reads.

    Raises:
        ValueError: no such policy or option, or a value it cannot have; the message says what there is.
    """
    spec = policy_spec(text)
    return make_policy(spec["name"], spec["options"])


def policy_spec(text: str) -> dict[str, Any]:
    """``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE`` as a configuration file has it: ``name`` and ``options``.

    Raises:
        ValueError: an option without a value.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"policy options are written NAME:OPTION=VALUE,..., but {part!r} has no value")
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
    """One run's record (`lab.records.run_record`). Raises ValueError for settings that cannot be."""
    started = time.perf_counter()
    profile = experiment.engine()
    asked = experiment.asked(run.qps, run.seed)
    if not asked:
        raise ValueError("the workload has no requests: ask for more of them, or for a longer time")
    predictions = predict(experiment.predictor, asked, run.seed)
    began = time.perf_counter()
    came = simulate(
        asked,
        predictions,
        profile,
        lambda: parse_policy(run.policy),
        step_mode=experiment.step_mode,
        replicas=experiment.replicas,
        learn=experiment.learn,
        apart=experiment.apart,
        step_jitter=experiment.step_jitter,
        seed=run.seed,
        on_ended=on_ended,
    )
    wall_s = time.perf_counter() - began
    costs = works(profile)
    return run_record(
        run.policy,
        _rate(asked) if run.qps is None else run.qps,
        run.seed,
        came.served,
        came.duration_s,
        wall_s=wall_s,
        scheduling_s=came.scheduling_s,
        bounds=bounds(asked, costs, experiment.replicas),
        steps=came.steps,
        decisions=came.decisions,
        preemptions=came.preemptions,
        utilisation=round(came.busy_s / (came.duration_s * experiment.replicas), 4) if came.duration_s else 0.0,
        setup_s=round(began - started, 3),
    )


def _rate(asked: Sequence[WorkloadRequest]) -> float:
    """The mean rate (1/s) of a trace at its own pace; 0 where all come at once."""
    span_s = asked[-1].at_s - asked[0].at_s
    return (len(asked) - 1) / span_s if span_s > 0 else 0.0


def perform_all(experiment: Experiment, runs: Sequence[Run], jobs: int = 1) -> Iterator[dict[str, Any]]:
    """The records of ``runs``, in order; ``jobs`` processes share the work."""
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
    jobs: int = 1,
    on_try: Callable[[float, float], None] = lambda qps, got: None,
) -> tuple[float, list[dict[str, Any]]]:
    """The highest rate (1/s, to a relative ``precision``) at which ``policy`` keeps ``adherence``, mean over ``seeds``.

    Doubles the rate until adherence falls below, then halves the interval. A rate at which nothing comes within the
    workload's time is kept: nobody was let down. Returns the rate (0 when not even 0.25/s is kept, `MOST_QPS` when
    nothing up to there is too much), and the records of the runs made on the way.
    """
    made: list[dict[str, Any]] = []

    def kept(qps: float) -> bool:
        runs = [Run(policy, qps, seed) for seed in seeds if experiment.asked(qps, seed)]
        if not runs:
            return True
        records = list(perform_all(experiment, runs, jobs))
        made.extend(records)
        got = fmean(record["slo_adherence"] for record in records)
        on_try(qps, got)
        return got >= adherence

    low, high = 0.0, 1.0
    while kept(high):
        low, high = high, high * 2
        if high > MOST_QPS:
            return low, made
    low = low or 0.25
    if low == 0.25 and not kept(low):
        return 0.0, made
    while high / low > 1 + precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low, made


def runs_of(policies: Iterable[str], rates: Iterable[float | None], seeds: Sequence[int]) -> list[Run]:
    """Every policy at every rate with every seed."""
    rates = list(rates)
    return [Run(policy, qps, seed) for policy in policies for qps in rates for seed in seeds]
