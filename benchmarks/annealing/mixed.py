"""Compares annealing with `scorpio` and `slack` on continuous arrivals with both kinds of bounds. Simulated.

    python -m benchmarks.annealing.mixed --json docs/results/annealing_mixed.json

S is the highest rate at which stock vLLM (`fcfs`, chunked prefill) attains 90% of the code-chat mix. The last two
policies apply annealing's order to `slack`'s feasible set (`benchmarks.annealing.on_slack`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks import results_json
from benchmarks.annealing.on_slack import AnnealingOnSlack
from benchmarks.command import Duration, JsonTo, Seeds
from gateway.policies.base import Policy
from lab.records.run_record import run_record
from lab.simulate.experiment import Experiment, capacity, parse_policy
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate

PROFILE = "a100-llama3.1-8b"
CAPACITY_ADHERENCE = 0.9
"""Adherence that defines S."""

POLICIES: dict[str, Callable[[], Policy]] = {
    **{name: partial(parse_policy, name) for name in ("fcfs", "s3", "scorpio", "annealing", "slack")},
    "annealing, nothing rejected": lambda: parse_policy("annealing:reject=false"),
    "slack, annealing's order": lambda: AnnealingOnSlack("order"),
    "slack, annealing's order and set": lambda: AnnealingOnSlack("set"),
}


def record_of(name: str, experiment: Experiment, qps: float, seed: int) -> dict[str, Any]:
    """The record of one run."""
    workload = experiment.requests(qps, seed)
    result = simulate(workload, predict(experiment.predictor, workload, seed), experiment.engine(), POLICIES[name])
    return run_record(
        name,
        qps,
        seed,
        result.results,
        result.duration_s,
        wall_s=0.0,
        scheduling_s=result.scheduling_s,
        decisions=result.decisions,
    )


def main(
    duration: Duration = 60.0,
    seeds: Seeds = 2,
    policy: Annotated[list[str] | None, typer.Option(help="Policy; repeat for several. [default: all]")] = None,
    json_path: JsonTo = None,
) -> None:
    """Find S, run every policy at S, 2S and 3S, and print a table."""
    experiment = Experiment(profile=PROFILE, workload={"name": "code-chat", "duration_s": duration})
    all_seeds = list(range(seeds))
    s, _ = capacity(experiment, "fcfs", all_seeds, CAPACITY_ADHERENCE)
    rows = []
    for load in (1, 2, 3):
        for name in policy or POLICIES:
            runs = [record_of(name, experiment, load * s, seed) for seed in all_seeds]
            row = {"policy": name, "load": f"{load}S", "qps": round(load * s, 2)}
            row |= {key: round(fmean(run[key] for run in runs), 4) for key in (
                "slo_adherence", "goodput", "rejected", "ttft_violations", "tpot_violations", "e2e_violations",
                "ttft_p50_s", "e2e_p50_s")}  # fmt: skip
            row["classes"] = {
                c: round(fmean(run["per_class"][c]["slo_adherence"] for run in runs), 4) for c in runs[0]["per_class"]
            }
            row["decision_ms"] = round(
                1e3 * sum(r["scheduling_s"] for r in runs) / sum(r["decisions"] for r in runs), 3
            )
            rows.append(row)
            sys.stderr.write(f"{row['load']} {name}: {row['slo_adherence']:.3f}\n")
    found = {
        "what": "simulated, code-chat workload, continuous arrivals",
        "command": f"python -m benchmarks.annealing.mixed --duration {duration:g} --seeds {seeds}",
        "profile": PROFILE,
        "s_qps": round(s, 2),
        "runs": rows,
    }
    if json_path is not None:
        results_json.write(found, json_path)
    for row in rows:
        sys.stdout.write(
            f"| {row['load']} | {row['policy']} | {row['slo_adherence']:.3f} | {row['goodput']:.2f} "
            f"| {row['rejected']:.3f} | {row['e2e_p50_s']:.2f} | {row['decision_ms']:.2f} |\n"
        )


if __name__ == "__main__":
    typer.run(main)
