"""Measures what one tenant can do to another: the victim's SLO adherence alone, and beside one kind of abuse each.

    python -m benchmarks.isolation.study --json > docs/results/isolation.json
    python -m benchmarks.isolation.study --kind flood --seed 0

The victim offers 10 requests/s of the ShareGPT workload with the six SLO classes of the paper, about a quarter of what
the simulated A100 holds. The abuser offers 200/s (`ABUSES`). Everything runs in virtual time (`lab.simulate`), so the
results depend on the seeds alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Annotated, Any

import typer

from engine_adapter.step_time.profile import load_profile
from gateway.policies.registry import make_policy
from lab.simulate.predictions import PredictedLength, predict
from lab.simulate.simulator import simulate
from lab.workload import WorkloadRequest, make_workload

PROFILE = "a100-llama3.1-8b"
VICTIM_QPS, ABUSER_QPS = 10.0, 200.0
DURATION_S = 40.0
SEEDS = (0, 1, 2, 3, 4)

Change = Callable[[WorkloadRequest], WorkloadRequest]


@dataclass(frozen=True, slots=True)
class Abuse:
    """What the abuser sends: the ShareGPT workload, each request changed by ``change``.

    ``predicted``: the output length (tokens) that the abuser declares; None: the predictor's.
    """

    says: str
    change: Change = lambda request: request
    predicted: float | None = None
    mix: dict[int, float] | None = None


def _bounds(ttft_s: float, tpot_s: float, category: int = 7) -> Change:
    return lambda request: replace(request, ttft_slo_s=ttft_s, tpot_slo_s=tpot_s, category=category)


def _huge(request: WorkloadRequest) -> WorkloadRequest:
    return replace(request, prompt_tokens=4000, output_tokens=16, ttft_slo_s=10.0, category=7)


ABUSES = {
    "flood": Abuse("the victim's own classes, 20 times as many requests"),
    "class": Abuse("one class only: 1 s, 50 ms", mix={5: 1.0}),
    "patient": Abuse("deadlines of 60 s", _bounds(60.0, 0.05)),
    "tight": Abuse("bounds of 0.2 s and 20 ms", _bounds(0.2, 0.02)),
    "loose": Abuse("TPOT bounds of 200 ms", _bounds(2.0, 0.2)),
    "short": Abuse("declares 1 output token, takes about 270", predicted=1.0),
    "long": Abuse("declares 2,000 output tokens, takes about 270", predicted=2000.0),
    "prompts": Abuse("prompts of 4,000 tokens", _huge),
    "best_effort": Abuse("no bounds at all", _bounds(math.inf, math.inf)),
    "no_ttft": Abuse("no TTFT bound, 50 ms", _bounds(math.inf, 0.05)),
}


def adherence(kind: str, seed: int, policy: str = "slack", victim_qps: float = VICTIM_QPS) -> float:
    """Return the victim's adherence (0 to 1) beside the abuse ``kind``; "" for none."""
    victim = make_workload("sharegpt", qps=victim_qps, duration_s=DURATION_S, seed=seed)
    merged = [("victim", one, length) for one, length in zip(victim, predict("shipped", victim, seed), strict=True)]
    if kind:
        abuse = ABUSES[kind]
        work = make_workload("sharegpt", qps=ABUSER_QPS, duration_s=DURATION_S, seed=seed + 1000, mix=abuse.mix)
        work = [abuse.change(one) for one in work]
        lengths = predict("shipped", work, seed + 1000)
        if abuse.predicted is not None:
            lengths = [PredictedLength(abuse.predicted, abuse.predicted)] * len(work)
        merged += [("abuser", one, length) for one, length in zip(work, lengths, strict=True)]
        merged.sort(key=lambda item: item[1].at_s)
    tenants = [tenant for tenant, _, _ in merged]
    workload, predictions = [one for _, one, _ in merged], [length for _, _, length in merged]
    result = simulate(
        workload, predictions, load_profile(PROFILE), lambda: make_policy(policy), tenants=tenants, seed=seed
    )
    attained = [one.attained for one, tenant in zip(result.results, tenants, strict=True) if tenant == "victim"]
    return sum(attained) / len(attained)


def _run(case: tuple[str, int]) -> dict[str, Any]:
    kind, seed = case
    return {"kind": kind, "seed": seed, "adherence": round(adherence(kind, seed), 4)}


def main(
    kind: Annotated[list[str] | None, typer.Option(help="Only these kinds of abuse.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Write the runs as JSON.")] = False,
) -> None:
    """Measure the victim's adherence alone and beside each kind of abuse."""
    kinds, seeds = ["", *(kind or ABUSES)], seed or SEEDS
    with ProcessPoolExecutor(jobs) as pool:
        runs = list(pool.map(_run, product(kinds, seeds)))
    if as_json:
        json.dump(runs, sys.stdout, indent=1)
        return
    for one in kinds:
        values = [run["adherence"] for run in runs if run["kind"] == one]
        print(f"{one or 'alone':12} {median(values):.3f}  ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    typer.run(main)
