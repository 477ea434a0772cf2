"""Measures speculative decoding under `slack`: without drafts, with all, and with those that the gate keeps. Simulated.

    python -m benchmarks.speculation.study --json docs/results/speculation.json
    python -m benchmarks.speculation.study --page docs/results/speculation.json

S is the capacity of stock vLLM (`fcfs`) without drafts: the highest rate at which mean adherence over the seeds is 90%.
The JSON file is written after each measurement, and a study that was stopped continues from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import Duration, Jobs, JsonTo, PageOf, Seeds, chosen, write_page
from benchmarks.speculation.bound import steady_states
from benchmarks.speculation.page import page
from engine_adapter.gates.composite import GATES
from engine_adapter.gates.slack import SlackGate
from engine_adapter.simulated.speculation import RandomAcceptance
from engine_adapter.step_time.profile import load_profile
from lab.records.run_record import run_record
from lab.simulate.experiment import parse_policy
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate
from lab.workload import make_workload

PROFILES = ("a100-llama3.1-8b", "h200-llama3.1-8b")
DRAFTS = 3
"""Drafts per decode; vLLM's examples use 2 to 5."""
DRAFTING = ((0.4, 0.0), (0.6, 0.0), (0.8, 0.0), (0.8, 3.0))
"""Acceptance of a draft, and milliseconds that drafting adds to a step: about 0 for n-grams, some for a draft model."""
TARGETS = (0.99, 0.9)
PRECISION = 0.02
"""Relative precision of a capacity."""
FIELDS = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations", "steps")

ALL_DRAFTS = "slack, all drafts"
"""Name of a gate that never drops drafts."""


class Case(NamedTuple):
    """A policy on an engine: ``drafts`` is "none", "all" or "chosen"; acceptance and ms per step of drafting."""

    profile: str
    policy: str = "slack"
    drafts: str = "none"
    acceptance: float = 0.0
    draft_ms: float = 0.0


def run(case: Case, duration_s: float, qps: float, seed: int) -> dict[str, Any]:
    """Return the record of one simulation of SCORPIO's six categories."""
    workload = make_workload("sharegpt", qps=qps, duration_s=duration_s, seed=seed)
    policy: Any = parse_policy(case.policy)
    if case.drafts == "all":
        policy.gate = ALL_DRAFTS
    speculation = RandomAcceptance(DRAFTS, case.acceptance, case.draft_ms / 1000) if case.drafts != "none" else None
    predictions, profile = predict("shipped", workload, seed), load_profile(case.profile)
    GATES[ALL_DRAFTS] = partial(SlackGate, choose_drafts=False)
    try:
        done = simulate(workload, predictions, profile, lambda: policy, speculation=speculation, seed=seed)
    finally:
        del GATES[ALL_DRAFTS]
    record = run_record(case.policy, qps, seed, done.results, done.duration_s, wall_s=0.0, steps=done.steps)
    return {key: record[key] for key in FIELDS}


def capacity(adherence: Callable[[float], float], target: float) -> float:
    """Return the highest rate (1/s) with an ``adherence`` of at least ``target``, by doubling and bisection."""
    low, high = 0.0, 8.0
    while adherence(high) >= target:
        low, high = high, 2 * high
    low = low or 0.5
    while high / low > 1 + PRECISION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if adherence(middle) >= target else (low, middle)
    return round(low, 2)


def measure(case: Case, stock_qps: float | None, seeds: int, duration_s: float) -> dict[str, Any]:
    """Return the capacities of ``case``, and its records at twice ``stock_qps`` (1/s) if that is known."""
    adherences: dict[float, float] = {}

    def adherence(qps: float) -> float:
        if qps not in adherences:
            adherences[qps] = fmean(run(case, duration_s, qps, seed)["slo_adherence"] for seed in range(seeds))
        return adherences[qps]

    found = case._asdict() | {"capacity": {f"{target:g}": capacity(adherence, target) for target in TARGETS}}
    if stock_qps is not None:
        found["runs"] = [{"seed": seed} | run(case, duration_s, 2 * stock_qps, seed) for seed in range(seeds)]
    return found


def cases(profile: str) -> list[Case]:
    """Return the cases that are compared on ``profile``, `slack` without drafts first."""
    drafted = [Case(profile, "slack", drafts, *each) for each in DRAFTING for drafts in ("all", "chosen")]
    return [Case(profile), *drafted]


def measure_missing(found: dict[str, Any], profiles: list[str], pool: Executor) -> Iterator[str]:
    """Add to ``found``, the document of the study, what it lacks; yield what was measured each time that it grows.

    Stock vLLM comes first, because the loads of the cases follow from its capacity.
    """
    measured = partial(measure, seeds=found["seeds"], duration_s=found["duration_s"])
    parts: list[dict[str, Any]] = found["profiles"]
    missing = [name for name in profiles if all(part["profile"] != name for part in parts)]
    stocks = pool.map(measured, [Case(name, "fcfs") for name in missing], [None] * len(missing))
    for name, stock in zip(missing, stocks, strict=True):
        steady = steady_states(name, DRAFTS, sorted({acceptance for acceptance, _ in DRAFTING}))
        parts.append({"profile": name, "stock_qps": stock["capacity"]["0.9"], "steady": steady, "cases": []})
        yield f"{name}: stock vLLM"
    left = [(part, case) for part in parts for case in cases(part["profile"])[len(part["cases"]) :]]
    results = pool.map(measured, [case for _, case in left], [part["stock_qps"] for part, _ in left])
    for (part, case), result in zip(left, results, strict=True):
        part["cases"].append(result)
        yield f"{case.profile}: {case.drafts}, acceptance {case.acceptance:g}, {case.draft_ms:g} ms"


def main(
    profile: Annotated[list[str] | None, typer.Option(help="Repeat for several. [default: all]")] = None,
    seeds: Seeds = 2,
    duration: Duration = 60.0,
    jobs: Jobs = 1,
    json_to: JsonTo = None,
    page_of: PageOf = None,
) -> None:
    """Simulate `slack` with and without speculative decoding. Takes 40 minutes of CPU time or more."""
    if page_of is not None:
        write_page(page_of, page)
        return
    settings = {"drafts": DRAFTS, "seeds": seeds, "duration_s": duration}
    found: dict[str, Any] = {**settings, "profiles": []} | results_json.read(json_to)
    if not found.items() >= settings.items():
        raise typer.BadParameter(f"{json_to} has results of other settings", param_hint="--json")
    progress = Console(stderr=True)
    with ProcessPoolExecutor(jobs) as pool:
        for done in measure_missing(found, chosen("--profile", profile, PROFILES), pool):
            results_json.write(found, json_to)
            progress.print(done)
    if json_to is None:
        typer.echo(page(found), nl=False)


if __name__ == "__main__":
    typer.run(main)
