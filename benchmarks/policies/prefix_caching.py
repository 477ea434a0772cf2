"""Measures what the gateway's prefix index is worth on workloads whose prompts share prefixes. Simulated.

    python -m benchmarks.policies.prefix_caching --json > docs/results/prefix_caching.json
    python -m benchmarks.policies.prefix_caching --page docs/results/prefix_caching.json

The engine caches prefixes in all runs. Without the index, the gateway plans with whole prompts. S is the capacity of
stock vLLM (`fcfs`) on the workload: the highest rate at which the mean adherence over the seeds is 90%.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.command import AsJson, Duration, Jobs, PageOf, Seeds, chosen, print_results, write_page
from benchmarks.markdown import policy_label, table, wrapped
from lab.simulate.experiment import Experiment, capacity, perform_all, runs_of

KEEPS = 0.9
"""Adherence that defines S and the capacities; the convention of docs/planning.md."""

LOADS = (1.0, 2.0, 3.0)
"""Offered rates as multiples of S."""

WORKLOADS = ("multi-turn", "agents")
PROFILE = "a100-llama3.1-8b"

VARIANTS = (("fcfs", True), ("scorpio", False), ("scorpio", True), ("slack", False), ("slack", True))
"""Policy, and whether the gateway has the prefix index. `fcfs` does not use it."""

FIELDS = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations", "hit_rate",
          "predicted_hit_rate", "count_bound")  # fmt: skip
"""Fields of a run record that the results keep."""


def measure(workload: str, seeds: list[int], duration_s: float, jobs: int) -> dict[str, Any]:
    """Return S (``stock_qps``, 1/s), the capacity of each variant, and the records of all variants at all loads."""
    indexed = Experiment(profile=PROFILE, workload={"name": workload, "duration_s": duration_s})
    capacities: list[dict[str, Any]] = []
    for policy, index in VARIANTS:
        qps, _ = capacity(replace(indexed, prefix_index=index), policy, seeds, KEEPS, jobs=jobs)
        capacities.append({"policy": policy, "index": index, "qps": round(qps, 2)})
    stock_qps = capacities[0]["qps"]
    runs: list[dict[str, Any]] = []
    for load in LOADS:
        for policy, index in VARIANTS:
            for record in perform_all(
                replace(indexed, prefix_index=index), runs_of([policy], [load * stock_qps], seeds), jobs
            ):
                fields = {key: record[key] for key in FIELDS}
                runs.append({"policy": policy, "index": index, "load": load, "seed": record["seed"], **fields})
    return {"workload": workload, "stock_qps": stock_qps, "capacity": capacities, "runs": runs}


def page(found: dict[str, Any]) -> str:
    """Return the result page of the study's JSON."""
    names = ", ".join(map(str, found["seeds"]))
    head = f"""# Prefix caching: what predicting hits is worth

**Simulated**, on `{found["profile"]}`: errors of the shipped length predictor, {found["duration_s"]:g} s of arrivals,
seeds {names}. The workloads are described in [planning](../planning.md#prefix-caching). Their sizes are mostly
conventions.

- The engine caches prefixes in every run, as vLLM does. *Without index*, the gateway plans with whole prompts.
- *S*: the highest rate at which stock vLLM (`fcfs`) keeps {found["keeps"]:.0%} adherence. *Capacity*: that rate for
each policy.
- *Goodput*: attained requests per second, drain included; mean over the seeds.
- *Hits*: share of the prompt tokens sent to the engine that were in its cache, and what the gateway predicted at
admission.

```
python -m benchmarks.policies.prefix_caching --json > docs/results/prefix_caching.json
python -m benchmarks.policies.prefix_caching --page docs/results/prefix_caching.json
```"""
    return "\n\n".join([wrapped(head), *(part for each in found["workloads"] for part in _section(each))]) + "\n"


def _section(part: dict[str, Any]) -> Iterator[str]:
    yield f"## {part['workload']}: S = {part['stock_qps']:g}/s"
    loads = list(dict.fromkeys(run["load"] for run in part["runs"]))
    heads = ["policy", "index", "capacity", *(f"goodput at {load:g} S" for load in loads)]
    heads += [f"adherence at {loads[-1]:g} S", f"hits at {loads[-1]:g} S", "predicted"]
    rows = []
    for variant in part["capacity"]:
        own = [run for run in part["runs"] if (run["policy"], run["index"]) == (variant["policy"], variant["index"])]
        last = [run for run in own if run["load"] == loads[-1]]
        index = "not used" if variant["policy"] == "fcfs" else "with" if variant["index"] else "without"
        rows.append(
            [
                policy_label(variant["policy"]),
                index,
                f"{variant['qps']:.1f}",
                *(f"{fmean(run['goodput'] for run in own if run['load'] == load):.1f}" for load in loads),
                *(f"{fmean(run[key] for run in last):.2f}" for key in ("slo_adherence", "hit_rate")),
                f"{fmean(run['predicted_hit_rate'] for run in last):.2f}",
            ]
        )
    yield table(heads, rows)


def main(
    workload: Annotated[
        list[str] | None, typer.Option(help="Run this workload; repeat for several. [default: all]")
    ] = None,
    seeds: Seeds = 3,
    duration: Duration = 60.0,
    jobs: Jobs = 1,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Simulate policies with and without the prefix index."""
    if page_of is not None:
        write_page(page_of, page)
        return
    numbers = list(range(seeds))
    parts = [measure(name, numbers, duration, jobs) for name in chosen("--workload", workload, WORKLOADS)]
    found = {"profile": PROFILE, "seeds": numbers, "duration_s": duration, "keeps": KEEPS, "workloads": parts}
    print_results(found, as_json, page)


if __name__ == "__main__":
    typer.run(main)
