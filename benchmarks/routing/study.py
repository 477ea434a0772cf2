"""Compares the routing policies of the gateway on many simulated engines.

    python -m benchmarks.routing.study --json docs/results/routing.json
    python -m benchmarks.routing.study --page docs/results/routing.json

All engines run `slack`, and all routing policies see the same requests, predictions and estimates. The router is the
gateway's own. S is the capacity of `least_load` in that row. The JSON file is written after each policy, and a study
that was stopped continues from it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import Duration, JsonTo, PageOf, Seeds, chosen, write_page
from benchmarks.routing.page import page
from lab.simulate.experiment import Experiment, Run, capacity, perform

KEEPS = 0.99
"""Adherence that defines a capacity."""

PRECISION = 0.025
"""Relative precision of a capacity: three runs of each seed if the first rate of the search is close."""

LOADS = (0.5, 1.0, 2.0)
"""Offered rates as multiples of S, for the goodput."""

POLICY = "slack"
SLOTS = 1024
"""Sequences of an engine's batch. With the 256 of the profiles, slots limit the looser classes before time does."""

A100, H200 = "a100-llama3.1-8b", "h200-llama3.1-8b"

OURS, DEFAULT = "headroom", "least_load"


@dataclass(frozen=True, slots=True)
class Row:
    """One fleet and its traffic. ``first_qps``: first rate of the search (1/s). ``routings``: those compared, S first.

    ``loads``: multiples of S at which goodput of `DEFAULT` and `OURS` is measured, with the first seed.
    """

    name: str
    workload: str
    replicas: int
    profiles: tuple[str, ...]
    first_qps: float
    routings: tuple[str, ...]
    loads: tuple[float, ...] = ()


ROWS = (
    Row("six categories, 4 A100", "sharegpt", 4, (), 97.0, (DEFAULT, OURS), LOADS),
    Row("six categories, 8 A100", "sharegpt", 8, (), 200.0, (DEFAULT, OURS, "least_requests")),
    Row("multi-turn, 8 A100", "multi-turn", 8, (), 113.0, (DEFAULT, OURS, "prefix_affinity")),
    Row("six categories, 4 A100 and 4 H200", "sharegpt", 8, (H200,), 350.0, (DEFAULT, OURS)),
    Row("six categories, 16 A100", "sharegpt", 16, (), 410.0, (DEFAULT, OURS)),
)

LARGE = (64, 256)
"""Numbers of A100s that are tried at `NEAR_LINEAR` of the capacity of `LINEAR_ROW` per engine."""

LINEAR_ROW, NEAR_LINEAR = "six categories, 8 A100", 0.95

FIELDS = ("goodput", "slo_adherence", "rejected", "hit_rate", "requests")
"""Fields of a run record that the results keep."""


def measure(row: Row, routing: str, seed: int, duration_s: float, stock_qps: float | None) -> dict[str, Any]:
    """Return the capacity (1/s) of ``routing`` with ``seed``, and the runs at the row's loads.

    A load is a multiple of ``stock_qps``; None: of the capacity that is found.
    """
    experiment = _experiment(row.workload, row.replicas, routing, duration_s, row.profiles)
    started = time.process_time()
    first_qps = row.first_qps * (1.17 if routing == OURS else 1.0)
    qps, tried = capacity(experiment, POLICY, [seed], KEEPS, precision=PRECISION, first_qps=first_qps, growth=1.05)
    runs = []
    for load in row.loads if seed == 0 and routing in (DEFAULT, OURS) else ():
        record = perform(experiment, Run(POLICY, load * (stock_qps or qps), seed))
        runs.append({"load": load, **{field: record[field] for field in FIELDS}})
    requests = sum(record["requests"] for record in tried)
    return {
        "routing": routing,
        "seed": seed,
        "qps": round(qps, 1),
        "decision_us": round(1e6 * sum(record["routing_s"] for record in tried) / requests, 1),
        "cpu_s": round(time.process_time() - started, 1),
        "runs": runs,
    }


def measure_large(parts: list[dict[str, Any]], replicas: int, duration_s: float) -> dict[str, Any]:
    """Return one run of `OURS` on ``replicas`` A100s, at `NEAR_LINEAR` of its capacity per engine in `LINEAR_ROW`."""
    part = next(part for part in parts if part["row"] == LINEAR_ROW)
    qps = fmean(one["qps"] for one in part["found"] if one["routing"] == OURS) / part["replicas"]
    rate = NEAR_LINEAR * qps * replicas
    started = time.process_time()
    record = perform(_experiment("sharegpt", replicas, OURS, duration_s), Run(POLICY, rate, 0))
    return {
        "replicas": replicas,
        "qps": round(rate, 1),
        "decision_us": round(1e6 * record["routing_s"] / record["requests"], 1),
        "cpu_s": round(time.process_time() - started, 1),
        **{field: record[field] for field in FIELDS},
    }


def _experiment(
    workload: str, replicas: int, routing: str, duration_s: float, profiles: tuple[str, ...] = ()
) -> Experiment:
    return Experiment(
        profile=A100,
        workload={"name": workload, "duration_s": duration_s},
        replicas=replicas,
        routing=routing,
        profiles=profiles,
        limits={"max_num_seqs": SLOTS},
    )


def main(
    row: Annotated[list[str] | None, typer.Option(help="Simulate this row; repeat for several. [default: all]")] = None,
    seeds: Seeds = 3,
    duration: Duration = 30.0,
    json_to: JsonTo = None,
    page_of: PageOf = None,
) -> None:
    """Simulate the routing policies on fleets of engines."""
    if page_of is not None:
        write_page(page_of, page)
        return
    names, progress = chosen("--row", row, [one.name for one in ROWS]), Console(stderr=True)
    found: dict[str, Any] = {"duration_s": duration, "keeps": KEEPS, "precision": PRECISION, "slots": SLOTS, "rows": []}
    if json_to is not None and json_to.exists():
        found |= json.loads(json_to.read_text(encoding="utf-8"))
    rows = [known for known in ROWS if known.name in names]
    wanted = [(seed, one, name) for seed in range(seeds) for one in rows for name in one.routings]
    for seed, one, name in wanted:
        part = _part(found["rows"], one)
        if any((known["routing"], known["seed"]) == (name, seed) for known in part["found"]):
            continue
        stock = next((known["qps"] for known in part["found"] if known["routing"] == DEFAULT), None)
        part["found"].append(measure(one, name, seed, duration, stock))
        progress.print(f"{one.name}: {name}, seed {seed}: {part['found'][-1]['qps']:g}/s")
        _save(found, json_to)
    large = found.setdefault("large", [])
    for replicas in LARGE if row is None else ():
        if all(known["replicas"] != replicas for known in large):
            large.append(measure_large(found["rows"], replicas, duration))
            progress.print(f"{replicas} A100: {large[-1]['slo_adherence']:.4f}")
            _save(found, json_to)
    if json_to is None:
        typer.echo(page(found), nl=False)


def _save(found: dict[str, Any], json_to: Path | None) -> None:
    if json_to is not None:
        json_to.write_text(results_json.dumps(found), encoding="utf-8")


def _part(parts: list[dict[str, Any]], row: Row) -> dict[str, Any]:
    """Return the results of ``row`` among ``parts``; adds empty ones in the order of `ROWS`."""
    for part in parts:
        if part["row"] == row.name:
            return part
    part = {"row": row.name, "replicas": row.replicas, "found": []}
    parts.append(part)
    order = [one.name for one in ROWS]
    parts.sort(key=lambda one: order.index(one["row"]))
    return part


if __name__ == "__main__":
    typer.run(main)
