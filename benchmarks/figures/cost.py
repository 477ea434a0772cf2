"""Run time of the simulator: 900 requests per policy, and how CPU time grows with the number of requests."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.figures.drawing import canvas, look
from benchmarks.figures.figure import Document, Figure, new_document
from benchmarks.figures.lab import Lab
from benchmarks.figures.records import Record, matching, policies_of
from benchmarks.markdown import policy_label, table
from lab.simulate.experiment import Experiment, parse_policy
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate

NAME = "cost"
POLICIES = ("fcfs", "s3", "mooncake", "scorpio", "slack")
PROFILE = "a100-llama3.1-8b"
QPS = 60.0
SEED = 0
REQUESTS, LIMIT_S, ROUNDS = 900, 1.0, 3
SIZES = (1_000, 10_000, 100_000)
LINEAR = 1.25
"""Largest growth of CPU time per request, for ten times the requests, that counts as linear.

1.25 allows for the noise of a shared machine."""


def measure(lab: Lab, quick: bool) -> Document:
    """Time the small runs alone in this process, then the large runs in the processes of ``lab``."""
    few, sizes = (5, (5, 10)) if quick else (REQUESTS, SIZES)
    lab.begin("Cost: small runs", ROUNDS * len(POLICIES))
    timings = []
    for _ in range(ROUNDS):
        for policy in POLICIES:
            timings.append({"what": "small", **timed((policy, few))})
            lab.advance()
    tasks = [(policy, requests) for requests in sorted(sizes, reverse=True) for policy in reversed(POLICIES)]
    large = sorted(
        lab.each("Cost: large runs", timed, tasks), key=lambda t: (POLICIES.index(t["policy"]), t["requests"])
    )
    timings += [{"what": "growth", **timing} for timing in large]
    machine = {"cores": os.cpu_count(), "load_average": [round(load, 2) for load in os.getloadavg()]}
    return new_document(NAME, (SEED,), (PROFILE,), qps=QPS, machine=machine, timings=timings)


def timed(task: tuple[str, int]) -> Record:
    """Wall and CPU seconds of one simulation, without the generation of its workload."""
    policy, requests = task
    experiment = Experiment(PROFILE, {"name": "sharegpt", "requests": requests})
    workload = experiment.requests(QPS, SEED)
    predictions = predict(experiment.predictor, workload, SEED)
    wall, cpu = time.perf_counter(), time.process_time()
    result = simulate(workload, predictions, experiment.engine(), lambda: parse_policy(policy))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "policy": policy,
        "requests": requests,
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "cpu_us_per_request": round(cpu / requests * 1e6, 1),
        "simulated_s": round(result.duration_s, 1),
        "steps": result.steps,
    }


def draw(document: Document, folder: Path) -> list[str]:
    """Draw CPU seconds over the number of requests, both logarithmic."""
    large = matching(document["timings"], what="growth")
    with canvas(folder / f"{NAME}.png", f"cost of simulating {PROFILE} at {QPS:g}/s", 1, 1, (6, 4.2)) as (
        figure,
        ((axes,),),
    ):
        for policy in policies_of(large):
            own = matching(large, policy=policy)
            colour, marker = look(policy)
            axes.loglog(
                [t["requests"] for t in own], [t["cpu_s"] for t in own], color=colour, marker=marker, label=policy
            )
        first, last = min(t["requests"] for t in large), max(t["requests"] for t in large)
        base = min(t["cpu_s"] for t in large) or 1e-3
        axes.loglog([first, last], [base, base * last / first], color="0.6", linestyle=":", label="linear")
        axes.set_xlabel("requests")
        axes.set_ylabel("CPU seconds")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return [f"{NAME}.png"]


def section(document: Document) -> str:
    """The tables of the small and of the large runs, each with its verdict."""
    small, large = (matching(document["timings"], what=what) for what in ("small", "growth"))
    few = small[0]["requests"]
    rows = []
    for policy in policies_of(small):
        walls = [t["wall_s"] for t in matching(small, policy=policy)]
        speed = f"{small[0]['simulated_s'] / min(walls):.0f}x"
        rows.append([policy_label(policy), f"{min(walls):.2f}", f"{max(walls):.2f}", speed])
    sizes = sorted({t["requests"] for t in large})
    heads = ["policy", *(f"{n:,} requests" for n in sizes), f"CPU per request, {sizes[-1]:,} over {sizes[-2]:,}"]
    growth_rows = []
    for policy in policies_of(large):
        by_size = {t["requests"]: t for t in matching(large, policy=policy)}
        cells = [f"{by_size[n]['wall_s']:.1f} s, {by_size[n]['cpu_us_per_request']:.0f} us" for n in sizes]
        growth_rows.append([policy_label(policy), *cells, f"{_growth(large, policy):.2f}"])
    slowest = _slowest_s(small)
    worst = max(policies_of(large), key=lambda p: _growth(large, p))
    factor = _growth(large, worst)
    return f"""**Requirement:** {few} requests at {QPS:g}/s on `{PROFILE}` take under {LIMIT_S:g} s of wall time with
each policy, and the cost is at most linear in the number of requests.

Wall seconds of {ROUNDS} rounds in one process, on a shared machine with {document["machine"]["cores"]} cores (load
average {document["machine"]["load_average"][0]:g} at the end). Other load on the machine can only make the numbers
larger.

{table(["policy", "fastest, s", "slowest, s", "faster than real time"], rows)}

The slowest policy takes {slowest:.2f} s in its best round: {"met" if slowest < LIMIT_S else "**not met**"}.

![CPU seconds over requests]({NAME}.png)

Wall seconds, and CPU microseconds per request, with two processes in parallel:

{table(heads, growth_rows)}

{"At most linear" if factor <= LINEAR else "**More than linear**"}: from {sizes[-2]:,} to {sizes[-1]:,} requests the
CPU time per request changes by at most {factor:.2f} times (`{worst}`). The comparison leaves out {sizes[0]:,} requests:
at this rate they take {sizes[0] / QPS:.0f} s, in which batch and queue do not reach a steady state.
"""


def _growth(large: list[Record], policy: str) -> float:
    """CPU time per request of the largest run over that of the second largest."""
    own = sorted(matching(large, policy=policy), key=lambda t: t["requests"])
    return float(own[-1]["cpu_us_per_request"] / max(own[-2]["cpu_us_per_request"], 1e-9))


def _slowest_s(small: list[Record]) -> float:
    """Wall seconds of the slowest policy, each in its best round."""
    return float(max(min(t["wall_s"] for t in matching(small, policy=p)) for p in policies_of(small)))


def headline(document: Document) -> str:
    """The slowest of the small runs."""
    small = matching(document["timings"], what="small")
    return f"{small[0]['requests']} requests take at most {_slowest_s(small):.2f} s with the slowest policy"


FIGURE = Figure(NAME, "Run time of the simulator", measure, draw, section, headline)
