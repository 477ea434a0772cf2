"""Compares the wanted replicas with a search, and autoscaling by them with other ways to size a fleet, in simulation.

    python -m benchmarks.autoscaling.study --json docs/results/autoscaling.json
    python -m benchmarks.autoscaling.study --page docs/results/autoscaling.json

The traces are Azure's, at `--rate-scale` times their rate. Every `EVERY_S` seconds the wanted replicas are computed
from the requests of the last `WINDOW_S` seconds with the gateway's own code. They get the true lengths and the step
times of the profile. A gateway estimates the lengths of answers that did not end, and learns step times. The search
knows the requests of a window beforehand, and simulates all of them. The JSON file is written after each number, and a
study that was stopped continues from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.autoscaling.page import page
from benchmarks.autoscaling.setting import (
    COLD_START_S,
    EVERY_S,
    POLICY,
    PROFILE,
    STABILISE_S,
    TARGET,
    WINDOW_S,
    Setting,
)
from benchmarks.command import Jobs, JsonTo, PageOf, write_page
from engine_adapter.step_time.profile import load_profile
from gateway.policies.registry import make_policy
from lab.simulate.lifecycle import Autoscaler, Changes, FleetLoad
from lab.simulate.replica_search import IDLE, fewest
from lab.simulate.simulator import simulate
from lab.simulate.step_jitter import USUAL_JITTER
from lab.simulate.wanted import Traffic, wanted_replicas

TRACES = ("azure-conv", "azure-code")
MOST = 64
"""Engines that a fleet can have."""

QUEUE_TARGETS = (2, 4, 8, 16, 32)
"""Requests that wait or run for each engine, to which queue-length scaling is tuned."""


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
            workload, predictions, load_profile(PROFILE), lambda: make_policy(POLICY, {}), replicas=engines,
            step_jitter=USUAL_JITTER, seed=setting.seed,
        )  # fmt: skip
        attained = sum(one.attained for one in result.results)
        return attained >= TARGET * len(workload) or result.busy_s < IDLE * engines * result.duration_s

    return fewest(keeps, first, 1, MOST) or MOST


def signal(setting: Setting, end_s: float) -> dict[str, float]:
    """Return the wanted replicas from the window before ``end_s``, the share that was sampled, and the CPU time (s)."""
    requests, predictions = setting.part(end_s - WINDOW_S, end_s)
    profile = load_profile(PROFILE)
    first = max(1, round(len(requests) / WINDOW_S / 5))
    answer = wanted_replicas(Traffic(requests, predictions, [profile], POLICY, target=TARGET, first=first, most=MOST))
    return {
        "end_s": end_s,
        "wanted": answer.wanted,
        "sampled": round(answer.sampled, 3),
        "cpu_s": round(answer.cpu_s, 2),
    }


def controlled(setting: Setting, name: str, scaler: Autoscaler | None, initial: int) -> dict[str, Any]:
    """Return adherence and GPU hours of a fleet of ``initial`` engines, which a scaler may change."""
    workload, predictions = setting.traffic()
    result = simulate(
        workload, predictions, load_profile(PROFILE), lambda: make_policy(POLICY, {}),
        replicas=initial if scaler is None else MOST // 4,
        changes=Changes(cold_start_s=COLD_START_S, autoscaler=scaler, initial=initial), step_jitter=USUAL_JITTER,
        seed=setting.seed,
    )  # fmt: skip
    return {
        "name": name,
        "adherence": round(sum(one.attained for one in result.results) / len(result.results), 4),
        "gpu_hours": round(result.gpu_s / 3600, 3),
        "most": max(size for _, size in result.sizes),
    }


class Study:
    """Adds to ``part``, the results of one trace, what is missing. Calls ``save`` after each number."""

    def __init__(self, setting: Setting, part: dict[str, Any], save: Callable[[str], None]) -> None:
        self._setting, self._part, self._save = setting, part, save

    def run(self, pool: Executor) -> None:
        """Compute the signals, then the searches that start from them, then the fleets that follow them."""
        setting = self._setting
        count = int((60 * setting.minutes - WINDOW_S) // EVERY_S) + 1
        ends = [WINDOW_S + EVERY_S * number for number in range(count)]
        signals = self._extend("signals", pool, signal, ends)
        wanted = {one["end_s"]: one["wanted"] for one in signals}
        firsts = [wanted[start + WINDOW_S] for start in setting.windows]
        needed = self._extend("searched", pool, searched, setting.windows, firsts)
        first, signalled = firsts[0], list(wanted.items())
        fleets: list[tuple[str, Autoscaler | None, int]] = [
            ("wanted replicas", Recorded(signalled), first),
            ("wanted replicas and one more", Recorded(signalled, 1), first + 1),
            ("static, the peak of the windows", None, max(needed)),
            ("static, the mean of the windows", None, max(1, round(fmean(needed)))),
            *(
                (f"queue length, {target} requests for each engine", QueueLength(target), first)
                for target in QUEUE_TARGETS
            ),
        ]
        self._extend("fleets", pool, controlled, *map(list, zip(*fleets, strict=True)))

    def _extend(self, key: str, pool: Executor, compute: Callable[..., Any], *columns: list[Any]) -> list[Any]:
        """Append what ``compute`` returns for each row of ``columns`` that has no result yet."""
        known: list[Any] = self._part.setdefault(key, [])
        missing = [column[len(known) :] for column in columns]
        for result in pool.map(compute, [self._setting] * len(missing[0]), *missing):
            known.append(result)
            self._save(f"{self._setting.trace}: {key} {len(known)} of {len(columns[0])}")
        return known


def main(
    rate_scale: Annotated[float, typer.Option(min=0.1, help="Factor on the rate of the traces.")] = 4.0,
    minutes: Annotated[float, typer.Option(min=10, help="Minutes of each trace.")] = 55.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    jobs: Jobs = 2,
    json_to: JsonTo = None,
    page_of: PageOf = None,
) -> None:
    """Compare autoscaling by wanted replicas with other ways to size a fleet. Takes about an hour."""
    if page_of is not None:
        write_page(page_of, page)
        return
    command = f"python -m benchmarks.autoscaling.study --rate-scale {rate_scale:g} --minutes {minutes:g} --seed {seed}"
    found: dict[str, Any] = {"command": command, "step_jitter": USUAL_JITTER.jitter, "traces": []}
    if json_to is not None and json_to.exists():
        known = json.loads(json_to.read_text(encoding="utf-8"))
        if known["command"] != command or known.get("step_jitter") != found["step_jitter"]:
            raise typer.BadParameter(f"{json_to} has results of other settings: remove it", param_hint="--json")
        found = known
    progress = Console(stderr=True)

    def save(text: str) -> None:
        progress.print(text)
        if json_to is not None:
            results_json.write(found, json_to)

    with ProcessPoolExecutor(jobs) as pool:
        for trace in TRACES:
            setting = Setting(trace, rate_scale, minutes, seed)
            part = next((known for known in found["traces"] if known["trace"] == trace), None)
            if part is None:
                part = {"trace": trace, "rate_scale": rate_scale, "minutes": minutes, "seed": seed}
                found["traces"].append(part)
            Study(setting, part, save).run(pool)
    if json_to is None:
        typer.echo(page(found), nl=False)


if __name__ == "__main__":
    typer.run(main)
