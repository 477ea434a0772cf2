"""Reproduces the annealing paper's experiment (arXiv 2504.14966): a standing set of code and chat tasks, against FCFS.

    python -m benchmarks.annealing.paper --seeds 2 --most 64 --json FILE.json --plot FILE.png

All tasks arrive at time 0. The study varies the size of the set, the maximum batch of the engines, and the number of
instances (one to four, with the requests spread by remaining KV memory). Bounds of the paper: TTFT 10 s and
TPOT 50 ms for chat, 30 s end to end for code (quoted from memory). Simulated: the policies of the product on the step
times of an A100, which they know.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks import results_json
from benchmarks.command import JsonTo, Seeds
from engine_adapter.step_time.profile import load_profile
from lab.simulate.experiment import parse_policy
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate
from lab.workload import WorkloadRequest, make_workload

PROFILE = "a100-llama3.1-8b"
SIZES = (8, 16, 32, 64, 128)
BATCHES = (1, 2, 4, 8, 16)
POLICIES: dict[str, str] = {
    "fcfs": "fcfs",
    "s3": "s3",
    "annealing": "annealing:reject=false,horizon=64,budget_ms=2,max_wait_s=1e6",
}


def standing(size: int, seed: int, slo_scale: float) -> list[WorkloadRequest]:
    """``size`` tasks, half code, half chat, all at time 0."""
    tasks = make_workload(
        "code-chat", qps=1.0, requests=size, seed=seed, slo_table="annealing-paper", slo_scale=slo_scale
    )
    return [replace(task, at_s=0.0) for task in tasks]


def serve(
    policy: str, tasks: list[WorkloadRequest], batch: int, instances: int, predictor: str, seed: int
) -> tuple[float, float]:
    """SLO attainment (0 to 1) and mean latency (s) of a set."""
    engine = replace(load_profile(PROFILE), max_num_seqs=batch)
    result = simulate(
        tasks,
        predict(predictor, tasks, seed),
        engine,
        lambda: parse_policy(POLICIES[policy]),
        replicas=instances,
        learn=False,
    )
    attained = sum(one.attained for one in result.results) / len(result.results)
    return attained, fmean([one.e2e_s for one in result.results if one.e2e_s is not None])


def point(size: int, batch: int, instances: int, seeds: int, slo_scale: float, predictor: str) -> dict[str, Any]:
    """Mean results of every policy on the same sets."""
    row: dict[str, Any] = {"requests": size, "batch": batch, "instances": instances}
    for policy in POLICIES:
        runs = [
            serve(policy, standing(size, seed, slo_scale), batch, instances, predictor, seed) for seed in range(seeds)
        ]
        row[policy] = {
            "attainment": round(fmean(run[0] for run in runs), 4),
            "mean_latency_s": round(fmean(run[1] for run in runs), 3),
        }
    fcfs, ours = row["fcfs"], row["annealing"]
    row["attainment_factor"] = round(ours["attainment"] / fcfs["attainment"], 2) if fcfs["attainment"] else None
    row["latency_change"] = round(ours["mean_latency_s"] / fcfs["mean_latency_s"] - 1, 4)
    return row


def main(
    seeds: Seeds = 3,
    slo_scale: Annotated[float, typer.Option(help="Multiplies the bounds.")] = 1.0,
    predictor: Annotated[str, typer.Option(help="Length predictor (lab.simulate.predictions).")] = "shipped",
    most: Annotated[int, typer.Option(help="Largest set.")] = SIZES[-1],
    json_path: JsonTo = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the results to this PNG.")] = None,
) -> None:
    """Run all sizes, batches and instances, and print a table."""
    sizes = [size for size in SIZES if size <= most]
    points = [(size, batch, 1) for batch in reversed(BATCHES) for size in sizes if size <= 32 * batch]
    points += [(size, 4, instances) for instances in (2, 3, 4) for size in sizes]
    rows = []
    for size, batch, instances in points:
        row = point(size, batch, instances, seeds, slo_scale, predictor)
        rows.append(row)
        fcfs, ours = row["fcfs"], row["annealing"]
        sys.stdout.write(
            f"| {size} | {batch} | {instances} | {fcfs['attainment']:.2f} | {row['s3']['attainment']:.2f} "
            f"| {ours['attainment']:.2f} | {row['attainment_factor']} | {row['latency_change']:+.1%} |\n"
        )
        sys.stdout.flush()
    found = {
        "what": "simulated, standing sets of code and chat tasks",
        "command": "python -m benchmarks.annealing.paper "
        f"--seeds {seeds} --slo-scale {slo_scale:g} --predictor {predictor} --most {most}",
        "profile": PROFILE,
        "policies": POLICIES,
        "points": rows,
    }
    if json_path is not None:
        results_json.write(found, json_path)
    if plot is not None:
        draw(rows, plot)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw attainment and the change of mean latency over the size of the set: one line per maximum batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for number, batch in enumerate(BATCHES):
        line = [row for row in rows if row["batch"] == batch and row["instances"] == 1]
        sizes, colour = [row["requests"] for row in line], f"C{number}"
        left.plot(sizes, [row["annealing"]["attainment"] for row in line], colour, label=f"batch {batch}")
        left.plot(sizes, [row["fcfs"]["attainment"] for row in line], colour, linestyle=":")
        right.plot(sizes, [100 * row["latency_change"] for row in line], colour)
    left.set(xscale="log", xlabel="requests", ylabel="SLO attainment", title="annealing (dotted: FCFS), simulated")
    right.axhline(-31.6, color="grey", linewidth=0.8)
    right.set(
        xscale="log", xlabel="requests", ylabel="mean latency against FCFS, %", title="grey: the paper's best, -31.6%"
    )
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
