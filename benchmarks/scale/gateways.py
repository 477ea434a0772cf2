"""Simulates gateways that divide the engines of a fleet: what that costs in goodput, and the time of a decision.

    python -m benchmarks.scale.gateways --json docs/results/gateways.json
    python -m benchmarks.scale.gateways --page docs/results/gateways.json

Each gateway routes with the product's own router to the engines of its share (`gateway.scheduling.shards`). A request
goes to a random gateway. All numbers of gateways see the same requests and predictions. The JSON file is written after
each run, and a study that was stopped continues from it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import JsonTo, PageOf, chosen, write_page
from benchmarks.scale.gateways_page import page
from lab.simulate.experiment import Experiment, Run, perform

POLICY = "slack"
SLOTS = 1024
"""Sequences of an engine's batch, as in `benchmarks.routing.study`."""

A100 = "a100-llama3.1-8b"

SHORT = {"name": "sharegpt", "max_prompt": 1024, "max_output": 96}
"""Requests of which an A100 holds about 100/s at 99%, and which end within about 5 s, so that 10 s show a steady load.

With whole answers an A100 holds 29/s, and a steady load needs over 30 s: ten times the requests.
"""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Engines and their traffic. ``gateways``: numbers of gateways to compare, by routing policy; 1 is the first."""

    name: str
    engines: int
    qps: float
    duration_s: float
    workload: dict[str, Any]
    gateways: dict[str, tuple[int, ...]]


# `least_load` looks at all engines of its gateway for each request, so a run with 100 takes minutes.
FLEETS = (
    Fleet("100 A100", 100, 10_000.0, 10.0, SHORT, {"headroom": (1, 2, 4, 10), "least_load": (1, 10)}),
    Fleet("100 A100, overloaded", 100, 13_000.0, 10.0, SHORT, {"headroom": (1, 10)}),
    Fleet("multi-turn, 8 A100", 8, 120.0, 30.0, {"name": "multi-turn"}, {"headroom": (1, 2, 4)}),
)

FIELDS = ("requests", "slo_adherence", "rejected", "ttft_violations", "tpot_violations", "hit_rate", "decisions")
"""Fields of a run record that the results keep."""


def measure(fleet: Fleet, routing: str, gateways: int, seed: int) -> dict[str, Any]:
    """Return one run of ``fleet`` behind ``gateways``. ``routing_us``, ``policy_us``: CPU time per request (us)."""
    experiment = Experiment(
        profile=A100,
        workload={**fleet.workload, "duration_s": fleet.duration_s},
        replicas=fleet.engines,
        routing=routing,
        gateways=gateways,
        limits={"max_num_seqs": SLOTS},
    )
    started = time.process_time()
    record = perform(experiment, Run(POLICY, fleet.qps, seed))
    requests = record["requests"]
    return {
        "fleet": fleet.name,
        "routing": routing,
        "gateways": gateways,
        "seed": seed,
        "goodput": round(record["slo_adherence"] * requests / fleet.duration_s, 1),
        "routing_us": round(1e6 * record["routing_s"] / requests, 1),
        "policy_us": round(1e6 * record["scheduling_s"] / requests, 1),
        "cpu_s": round(time.process_time() - started, 1),
        **{field: record[field] for field in FIELDS},
    }


def main(
    fleet: Annotated[
        list[str] | None, typer.Option(help="Simulate this fleet; repeat for several. [default: all]")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, which are 0, 1, ...")] = 1,
    json_to: JsonTo = None,
    page_of: PageOf = None,
) -> None:
    """Simulate several gateways in front of the engines of a fleet."""
    if page_of is not None:
        write_page(page_of, page)
        return
    names, progress = chosen("--fleet", fleet, [one.name for one in FLEETS]), Console(stderr=True)
    fleets = [one for one in FLEETS if one.name in names]
    found: dict[str, Any] = {
        "slots": SLOTS,
        "fleets": [
            {"fleet": one.name, "engines": one.engines, "qps": one.qps, "duration_s": one.duration_s, **_limits(one)}
            for one in FLEETS
        ],
        "runs": [],
    }
    if json_to is not None and json_to.exists():
        found["runs"] = json.loads(json_to.read_text(encoding="utf-8"))["runs"]
    known = {(run["fleet"], run["routing"], run["gateways"], run["seed"]) for run in found["runs"]}
    for seed in range(seeds):
        for one in fleets:
            for routing, counts in one.gateways.items():
                for gateways in counts:
                    if (one.name, routing, gateways, seed) in known:
                        continue
                    found["runs"].append(measure(one, routing, gateways, seed))
                    progress.print(f"{one.name}: {routing}, {gateways} gateways, seed {seed}: {found['runs'][-1]}")
                    _save(found, json_to)
    if json_to is None:
        typer.echo(page(found), nl=False)


def _limits(fleet: Fleet) -> dict[str, Any]:
    return {key: fleet.workload.get(key) for key in ("max_prompt", "max_output")}


def _save(found: dict[str, Any], json_to: Path | None) -> None:
    if json_to is not None:
        results_json.write(found, json_to)


if __name__ == "__main__":
    typer.run(main)
