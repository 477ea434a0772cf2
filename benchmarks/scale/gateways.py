"""Simulates gateways that divide the engines of a fleet: what that costs in goodput, and the time of a decision.

    python -m benchmarks.scale.gateways --json docs/results/gateways.json
    python -m benchmarks.scale.gateways --page docs/results/gateways.json

Each gateway routes with the product's own router to the engines of its share (`gateway.scheduling.shards`). A request
goes to a random gateway. All numbers of gateways see the same requests and predictions. The JSON file is written after
each run, and a study that was stopped continues from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import JsonTo, PageOf, chosen, write_page
from benchmarks.fleet import SLOTS, fleet_of, fleet_run
from benchmarks.scale.gateways_page import page

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
    """Return one run of ``fleet`` behind ``gateways`` (`benchmarks.fleet.fleet_run`)."""
    experiment = fleet_of(fleet.workload, fleet.duration_s, fleet.engines, routing, gateways=gateways, step_jitter=None)
    run = fleet_run(experiment, fleet.qps, seed, FIELDS)
    return {"fleet": fleet.name, "routing": routing, "gateways": gateways, "seed": seed, **run}


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
        "runs": results_json.read(json_to).get("runs", []),
    }
    known = {(run["fleet"], run["routing"], run["gateways"], run["seed"]) for run in found["runs"]}
    for seed in range(seeds):
        for one in fleets:
            for routing, counts in one.gateways.items():
                for gateways in counts:
                    if (one.name, routing, gateways, seed) in known:
                        continue
                    found["runs"].append(measure(one, routing, gateways, seed))
                    progress.print(f"{one.name}: {routing}, {gateways} gateways, seed {seed}: {found['runs'][-1]}")
                    results_json.write(found, json_to)
    if json_to is None:
        typer.echo(page(found), nl=False)


def _limits(fleet: Fleet) -> dict[str, Any]:
    return {key: fleet.workload.get(key) for key in ("max_prompt", "max_output")}


if __name__ == "__main__":
    typer.run(main)
