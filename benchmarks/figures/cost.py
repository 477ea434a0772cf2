"""What a simulation costs: the issue's 900 requests, and how the cost grows with their number."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.figures.drawing import canvas, look
from benchmarks.figures.figure import Document, Figure, document
from benchmarks.figures.lab import Lab
from benchmarks.figures.records import Record, name_of, of, policies, table
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
"""Ten times the requests may take ten times as long, and a quarter more for the machine's noise."""


def measure(lab: Lab, quick: bool) -> Document:
    """First the 900, in this process with nothing beside it; then the large ones, shared among the lab's processes."""
    few, sizes = (5, (5, 10)) if quick else (REQUESTS, SIZES)
    lab.begin("Cost: the small runs", ROUNDS * len(POLICIES))
    timings = []
    for _ in range(ROUNDS):
        for policy in POLICIES:
            timings.append({"what": "small", **timed((policy, few))})
            lab.advance()
    tasks = [(policy, requests) for requests in sorted(sizes, reverse=True) for policy in reversed(POLICIES)]
    grown = sorted(
        lab.each("Cost: the large runs", timed, tasks), key=lambda t: (POLICIES.index(t["policy"]), t["requests"])
    )
    timings += [{"what": "growth", **timing} for timing in grown]
    machine = {"cores": os.cpu_count(), "load_average": [round(load, 2) for load in os.getloadavg()]}
    return document(NAME, (SEED,), (PROFILE,), qps=QPS, machine=machine, timings=timings)


def timed(task: tuple[str, int]) -> Record:
    """Seconds, by the wall and of this process, that the simulation alone takes."""
    policy, requests = task
    experiment = Experiment(PROFILE, {"name": "sharegpt", "requests": requests})
    asked = experiment.requests(QPS, SEED)
    predictions = predict(experiment.predictor, asked, SEED)
    wall, cpu = time.perf_counter(), time.process_time()
    came = simulate(asked, predictions, experiment.engine(), lambda: parse_policy(policy))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "policy": policy,
        "requests": requests,
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "cpu_us_per_request": round(cpu / requests * 1e6, 1),
        "simulated_s": round(came.duration_s, 1),
        "steps": came.steps,
    }


def draw(made: Document, folder: Path) -> list[str]:
    """CPU seconds over requests, both logarithmic."""
    grown = of(made["timings"], what="growth")
    with canvas(folder / f"{NAME}.png", f"cost of simulating {PROFILE} at {QPS:g}/s", 1, 1, (6, 4.2)) as (
        figure,
        ((axes,),),
    ):
        for policy in policies(grown):
            own = of(grown, policy=policy)
            colour, marker = look(policy)
            axes.loglog(
                [t["requests"] for t in own], [t["cpu_s"] for t in own], color=colour, marker=marker, label=policy
            )
        first, last = min(t["requests"] for t in grown), max(t["requests"] for t in grown)
        base = min(t["cpu_s"] for t in grown) or 1e-3
        axes.loglog([first, last], [base, base * last / first], color="0.6", linestyle=":", label="linear")
        axes.set_xlabel("requests")
        axes.set_ylabel("CPU seconds")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return [f"{NAME}.png"]


def section(made: Document) -> str:
    """Both tables."""
    small, grown = of(made["timings"], what="small"), of(made["timings"], what="growth")
    few = small[0]["requests"]
    rows = []
    for policy in policies(small):
        walls = [t["wall_s"] for t in of(small, policy=policy)]
        rows.append(
            [name_of(policy), f"{min(walls):.2f}", f"{max(walls):.2f}", f"{small[0]['simulated_s'] / min(walls):.0f}x"]
        )
    sizes = sorted({t["requests"] for t in grown})
    heads = ["policy", *(f"{n:,} requests" for n in sizes), f"a request of {sizes[-1]:,} over one of {sizes[-2]:,}"]
    growth = []
    for policy in policies(grown):
        by_size = {t["requests"]: t for t in of(grown, policy=policy)}
        cells = [f"{by_size[n]['wall_s']:.1f} s, {by_size[n]['cpu_us_per_request']:.0f} us" for n in sizes]
        growth.append([name_of(policy), *cells, f"{_growth(grown, policy):.2f}"])
    slowest = max(min(t["wall_s"] for t in of(small, policy=p)) for p in policies(small))
    worst = max(policies(grown), key=lambda p: _growth(grown, p))
    factor = _growth(grown, worst)
    return f"""**Asked:** {few} requests at {QPS:g}/s on `{PROFILE}` in under {LIMIT_S:g} s of wall time for each
policy; cost at most linear in the requests.

Wall seconds of {ROUNDS} rounds, one process, on a machine with {made["machine"]["cores"]} cores that others use at
the same time (load average
{made["machine"]["load_average"][0]:g} at the end): the numbers are noisy, upwards.

{table(["policy", "fastest, s", "slowest, s", "faster than real time"], rows)}

The slowest policy takes {slowest:.2f} s at its best: {"met" if slowest < LIMIT_S else "**not met**"}.

![CPU seconds over requests]({NAME}.png)

Wall seconds, and CPU microseconds a request, two processes at a time:

{table(heads, growth)}

{"At most linear" if factor <= LINEAR else "**More than linear**"}: from {sizes[-2]:,} to {sizes[-1]:,} requests the
CPU time of one changes by at most {factor:.2f} times (`{worst}`).
{sizes[0]:,} requests at this rate are {sizes[0] / QPS:.0f} s, in which batch and queue are still filling: no steady
state, so the comparison begins with the next size.
"""


def _growth(grown: list[Record], policy: str) -> float:
    own = sorted(of(grown, policy=policy), key=lambda t: t["requests"])
    return float(own[-1]["cpu_us_per_request"] / max(own[-2]["cpu_us_per_request"], 1e-9))


def headline(made: Document) -> str:
    """The slowest of the small runs."""
    small = of(made["timings"], what="small")
    slowest = max(min(t["wall_s"] for t in of(small, policy=p)) for p in policies(small))
    return f"{small[0]['requests']} requests in at most {slowest:.2f} s, for the slowest policy"


FIGURE = Figure(NAME, "What a simulation costs", measure, draw, section, headline)
