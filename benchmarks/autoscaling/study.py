"""Compares the wanted replicas with a search, and autoscaling by them with other ways to size a fleet, in simulation.

    python -m benchmarks.autoscaling.study --json > docs/results/autoscaling.json
    python -m benchmarks.autoscaling.study --page docs/results/autoscaling.json

The traces are Azure's, at `--rate-scale` times their rate. Every `EVERY_S` seconds the wanted replicas are computed
from the requests of the last `WINDOW_S` seconds, as the gateway does. The search knows the requests of a window
beforehand, and simulates all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.command import AsJson, Jobs, PageOf, print_results, write_page
from benchmarks.markdown import table, wrapped
from engine_adapter.step_time.profile import load_profile
from gateway.policies.registry import make_policy
from lab.simulate.lifecycle import Autoscaler, Changes, FleetLoad
from lab.simulate.predictions import PredictedLength, predict
from lab.simulate.replica_search import IDLE, fewest
from lab.simulate.simulator import simulate
from lab.simulate.wanted import Traffic, wanted_replicas
from lab.workload import WorkloadRequest, make_workload

PROFILE, POLICY, TARGET = "a100-llama3.1-8b", "slack", 0.99
TRACES = ("azure-conv", "azure-code")
WINDOW_S, EVERY_S = 300.0, 150.0
COLD_START_S = 60.0
MOST = 64
QUEUE_TARGETS = (2, 4, 8, 16, 32)
"""Requests that wait or run for each engine, to which queue-length scaling is tuned."""

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


class Recorded:
    """Scales to numbers that were computed before: the latest of ``wanted`` (time and number), and ``spare`` more."""

    interval_s = 15.0

    def __init__(self, wanted: list[tuple[float, int]], spare: int = 0) -> None:
        self._wanted, self._spare = wanted, spare

    def replicas(self, load: FleetLoad) -> int:
        """Return the highest number of the last `STABILISE_S` seconds; before the first one, keep what there is."""
        known = [number for at_s, number in self._wanted if at_s <= load.now]
        if not known:
            return load.serving + load.starting
        recent = [n for at_s, n in self._wanted if load.now - STABILISE_S < at_s <= load.now]
        return max(recent or known[-1:]) + self._spare


class QueueLength:
    """Kubernetes' HorizontalPodAutoscaler on the requests that wait or run, ``target`` for each engine."""

    interval_s = 15.0

    def __init__(self, target: int) -> None:
        self._target = target
        self._recent: list[tuple[float, int]] = []

    def replicas(self, load: FleetLoad) -> int:
        """Return the number for the load: within 10% no change, at most twice as many, and down after `STABILISE_S`."""
        ratio = (load.waiting + load.running) / (self._target * max(1, load.serving))
        now = load.serving if abs(ratio - 1) <= 0.1 else math.ceil(load.serving * ratio)
        now = min(max(1, now), 2 * max(1, load.serving))
        self._recent = [(at, n) for at, n in self._recent if at > load.now - STABILISE_S] + [(load.now, now)]
        return max(n for _, n in self._recent)


def searched(setting: Setting, start_s: float, first: int) -> int:
    """Return the fewest engines for the window from ``start_s``, which starts with idle engines."""
    workload, predictions = setting.part(start_s, start_s + WINDOW_S)

    def keeps(engines: int) -> bool:
        result = simulate(
            workload, predictions, load_profile(PROFILE), lambda: make_policy(POLICY, {}), replicas=engines
        )
        attained = sum(one.attained for one in result.results)
        return attained >= TARGET * len(workload) or result.busy_s < IDLE * engines * result.duration_s

    return fewest(keeps, first, 1, MOST) or MOST


def signal(setting: Setting, end_s: float) -> tuple[int, float, float]:
    """Return the wanted replicas from the window before ``end_s``, the share that was sampled, and the CPU time (s)."""
    requests, predictions = setting.part(end_s - WINDOW_S, end_s)
    profile = load_profile(PROFILE)
    first = max(1, round(len(requests) / WINDOW_S / 5))
    answer = wanted_replicas(Traffic(requests, predictions, [profile], POLICY, target=TARGET, first=first, most=MOST))
    return answer.wanted, answer.sampled, answer.cpu_s


def controlled(setting: Setting, name: str, scaler: Autoscaler | None, initial: int) -> dict[str, Any]:
    """Return adherence and GPU hours of a fleet of ``initial`` engines, which a scaler may change."""
    workload, predictions = setting.traffic()
    result = simulate(
        workload, predictions, load_profile(PROFILE), lambda: make_policy(POLICY, {}),
        replicas=initial if scaler is None else MOST // 4,
        changes=Changes(cold_start_s=COLD_START_S, autoscaler=scaler, initial=initial),
    )  # fmt: skip
    return {
        "name": name,
        "adherence": round(sum(one.attained for one in result.results) / len(result.results), 4),
        "gpu_hours": round(result.gpu_s / 3600, 3),
        "most": max(size for _, size in result.sizes),
    }


def measured(setting: Setting, jobs: int) -> dict[str, Any]:
    """Return the windows and the fleets of one trace."""
    ends = [WINDOW_S + EVERY_S * number for number in range(int((60 * setting.minutes - WINDOW_S) // EVERY_S) + 1)]
    with ProcessPoolExecutor(jobs) as pool:
        signals = list(pool.map(signal, [setting] * len(ends), ends))
        by_end = {end: found[0] for end, found in zip(ends, signals, strict=True)}
        windows = setting.windows
        firsts = [by_end[start + WINDOW_S] for start in windows]
        needed = list(pool.map(searched, [setting] * len(windows), windows, firsts))
        wanted = [(end, by_end[end]) for end in ends]
        first = firsts[0]
        fleets: list[tuple[str, Autoscaler | None, int]] = [
            ("wanted replicas", Recorded(wanted), first),
            ("wanted replicas and one more", Recorded(wanted, 1), first + 1),
            ("static, the peak of the windows", None, max(needed)),
            ("static, the mean of the windows", None, max(1, round(fmean(needed)))),
            *((f"queue length, {target} for each engine", QueueLength(target), first) for target in QUEUE_TARGETS),
        ]
        runs = list(pool.map(controlled, [setting] * len(fleets), *zip(*fleets, strict=True)))
    return {
        "trace": setting.trace,
        "rate_scale": setting.rate_scale,
        "minutes": setting.minutes,
        "seed": setting.seed,
        "windows": [
            {"start_s": start, "searched": need, "same": by_end[start + WINDOW_S], "before": by_end.get(start)}
            for start, need in zip(windows, needed, strict=True)
        ],
        "sampled": round(fmean(share for _, share, _ in signals), 3),
        "signal_cpu_s": round(fmean(cpu_s for _, _, cpu_s in signals), 2),
        "fleets": runs,
    }


def page(found: dict[str, Any]) -> str:
    """Return the page of the results."""
    traces = found["traces"]
    windows = [(t["trace"], w) for t in traces for w in t["windows"]]
    same = [abs(w["same"] - w["searched"]) for _, w in windows]
    before = [abs(w["before"] - w["searched"]) for _, w in windows if w["before"] is not None]

    def within(errors: list[int], most: int) -> str:
        return f"{sum(error <= most for error in errors)} of {len(errors)}"

    steps = [abs(b["searched"] - a["searched"]) for t in traces for a, b in pairwise(t["windows"])]
    accuracy = table(
        ["wanted replicas from", "equal to the search", "within one", "largest difference"],
        [
            ["the requests of the same window", within(same, 0), within(same, 1), str(max(same, default=0))],
            ["the window before", within(before, 0), within(before, 1), str(max(before, default=0))],
            ["the search of the window before", within(steps, 0), within(steps, 1), str(max(steps, default=0))],
        ],
    )
    rows = [
        [t["trace"], run["name"], f"{run['adherence']:.4f}", f"{run['gpu_hours']:.2f}", str(run["most"])]
        for t in traces
        for run in t["fleets"]
    ]
    sizes = "; ".join(f"{t['trace']}: {', '.join(str(w['searched']) for w in t['windows'])}" for t in traces)
    cpu = max(t["signal_cpu_s"] for t in traces)
    sampled = min(t["sampled"] for t in traces)
    return f"""# Autoscaling by wanted replicas

{
        wrapped(f'''
Simulated. Azure's traces at {traces[0]['rate_scale']:g} times their rate (overlaid copies), the first
{traces[0]['minutes']:g} minutes; profile `{PROFILE}`, policy `{POLICY}`, the six SLO categories, prompts of at most
7,000 tokens, seed {traces[0]['seed']}. The target is {TARGET:.0%} of the requests. The signal is computed every
{EVERY_S:g} s from the last {WINDOW_S:g} s;
it takes {cpu:g} s of CPU time on average and simulates {sampled:.0%} of the requests or more.''')
    }

    {found["command"]}

## Wanted replicas against the search

{accuracy}

{wrapped(f'''The search finds, window by window: {sizes}.''')}

## Adherence and GPU hours

{table(["trace", "fleet", "adherence", "GPU hours", "most engines"], rows)}

{
        wrapped(f'''
- An engine serves {COLD_START_S:g} s after it is started, and its GPU counts from the start until it has drained.
- The static fleets know the whole trace beforehand.
- Queue-length scaling is Kubernetes' rule every 15 s, with the best of these targets to be chosen afterwards.
- All scale down to the highest number of the last {STABILISE_S:g} s.
- Wanted replicas are late by construction: they know the last {WINDOW_S:g} s only, and a new engine takes
  {COLD_START_S:g} s more.''')
    }
"""


def main(
    rate_scale: Annotated[float, typer.Option(min=0.1, help="Factor on the rate of the traces.")] = 4.0,
    minutes: Annotated[float, typer.Option(min=10, help="Minutes of each trace.")] = 55.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    jobs: Jobs = 2,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Compare autoscaling by wanted replicas with other ways to size a fleet."""
    make: Callable[[Any], str] = page
    if page_of is not None:
        write_page(page_of, make)
        return
    command = f"python -m benchmarks.autoscaling.study --rate-scale {rate_scale:g} --minutes {minutes:g} --seed {seed}"
    traces = [measured(Setting(trace, rate_scale, minutes, seed), jobs) for trace in TRACES]
    print_results({"command": command, "traces": traces}, as_json, make)


if __name__ == "__main__":
    typer.run(main)
