"""Measures speculative decoding under `slack`: without drafts, with all, and with those that the gate keeps. Simulated.

    python -m benchmarks.speculation.study --json > docs/results/speculation.json
    python -m benchmarks.speculation.study --page docs/results/speculation.json

S is the capacity of stock vLLM (`fcfs`) without drafts: the highest rate at which mean adherence over the seeds is 90%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.command import AsJson, Duration, Jobs, PageOf, Seeds, print_results, write_page
from benchmarks.markdown import table, wrapped
from benchmarks.speculation.bound import PACE_S, bounds
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


def measure(case: Case, seeds: int, duration_s: float, stock_qps: float | None = None) -> dict[str, Any]:
    """Return the capacities of ``case``, and its records at twice ``stock_qps`` (1/s)."""
    adherences: dict[float, float] = {}

    def adherence(qps: float) -> float:
        if qps not in adherences:
            adherences[qps] = fmean(run(case, duration_s, qps, seed)["slo_adherence"] for seed in range(seeds))
        return adherences[qps]

    found = case._asdict() | {"capacity": {f"{target:g}": capacity(adherence, target) for target in TARGETS}}
    if stock_qps is not None:
        found["runs"] = [{"seed": seed} | run(case, duration_s, 2 * stock_qps, seed) for seed in range(seeds)]
    return found


def study(profiles: list[str], seeds: int, duration_s: float, jobs: int) -> dict[str, Any]:
    """Return the document of the study."""
    found: dict[str, Any] = {"drafts": DRAFTS, "seeds": seeds, "duration_s": duration_s, "profiles": []}
    with ProcessPoolExecutor(jobs) as pool:
        for profile in profiles:
            stock = measure(Case(profile, "fcfs"), seeds, duration_s)
            stock_qps = stock["capacity"]["0.9"]
            cases = [Case(profile)]
            cases += [Case(profile, "slack", drafts, *each) for each in DRAFTING for drafts in ("all", "chosen")]
            parts = pool.map(partial(measure, seeds=seeds, duration_s=duration_s, stock_qps=stock_qps), cases)
            acceptances = sorted({acceptance for acceptance, _ in DRAFTING})
            found["profiles"].append(
                {
                    "profile": profile,
                    "stock_qps": stock_qps,
                    "bounds": bounds(profile, DRAFTS, acceptances),
                    "cases": list(parts),
                }
            )
    return found


def page(found: dict[str, Any]) -> str:
    """Return the result page of the study's JSON."""
    head = f"""# Speculative decoding under `slack`

**Simulated**: SCORPIO's six categories (paces of 30 and 50 ms), errors of the shipped length predictor,
{found["duration_s"]:g} s of arrivals, {found["seeds"]} seeds, {found["drafts"]} drafts per decode.

- *None*: no speculative decoding.
- *All*: each decode verifies all of its drafts, as in stock vLLM.
- *Chosen*: the step gate chooses the drafts that bring the most tokens per second
([how](../slack.md#speculative-decoding)).
- *Acceptance*: the probability that a draft is accepted if those before it are. It is an input here, and the same for
all requests. The gate learns it.
- *Drafting*: milliseconds that making drafts adds to a step. N-grams cost almost nothing, a draft model does.
- *Capacity*: the highest rate that keeps the adherence. *S*: capacity of stock vLLM (`fcfs`) without drafts, at 90%.
- *Goodput*: attained requests per second, drain included; mean over the seeds. *2 S*: offered at twice S.
- *Steady state*: the largest gain in a steady state of equal decodes, prompts included, without queues or variation,
with the best number of drafts. Steps may take {1000 * PACE_S:g} ms for each token that a decode brings. Gains beyond it
come from different paces and from bursts.

Rows in which chosen drafts lose against none:

- A100, acceptance 0.4: the adherence at 2 S is lower.
- A100, 3 ms of drafting: goodput and adherence at 2 S are lower.
- H200, acceptance 0.4: the capacity at 90% is 0.99x.

On the H200, chosen drafts at an acceptance of 0.6 gain 1.11x, which is the gain of the steady state. Its 256 slots are
full and decode in 13 ms, so no pace is tight. One draft for each takes 18 ms and brings 1.6 times the tokens: 1.18x
the tokens per second, of which prompts leave 1.11x. On the A100, paces are tight: without drafts, `slack` stays below
the steady state, and drafts gain more than it.

```
python -m benchmarks.speculation.study --json > docs/results/speculation.json
python -m benchmarks.speculation.study --page docs/results/speculation.json
```"""
    return "\n\n".join([wrapped(head), *(part for each in found["profiles"] for part in _section(each))]) + "\n"


def _section(part: dict[str, Any]) -> Iterator[str]:
    yield f"## {part['profile']}: S = {part['stock_qps']:g}/s"
    none = part["cases"][0]["capacity"]
    heads = ["drafts", "acceptance", "drafting", *(f"capacity at {float(target):.0%}" for target in none)]
    rows = []
    for case in part["cases"]:
        plain = case["drafts"] == "none"
        rows.append(
            [
                case["drafts"],
                "" if plain else f"{case['acceptance']:g}",
                "" if plain else f"{case['draft_ms']:g} ms",
                *(f"{qps:.1f} ({qps / none[target]:.2f}x)" for target, qps in case["capacity"].items()),
                *(f"{fmean(run[key] for run in case['runs']):.{digits}f}" for key, digits in _AT_2S),
            ]
        )
    yield table([*heads, "goodput at 2 S", "adherence at 2 S"], rows)
    gains = ", ".join(f"{each['gain']:.2f}x at {each['acceptance']:g}" for each in part["bounds"]["gains"])
    yield wrapped(f"Steady state, by acceptance: {gains}.")


_AT_2S = (("goodput", 1), ("slo_adherence", 3))


def main(
    profile: Annotated[list[str] | None, typer.Option(help="Repeat for several. [default: all]")] = None,
    seeds: Seeds = 2,
    duration: Duration = 60.0,
    jobs: Jobs = 1,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Simulate `slack` with and without speculative decoding."""
    if page_of is not None:
        write_page(page_of, page)
        return
    found = study(profile or list(PROFILES), seeds, duration, jobs)
    print_results(found, as_json, page)


if __name__ == "__main__":
    typer.run(main)
