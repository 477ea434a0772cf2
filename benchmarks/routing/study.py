"""Compares the routing policies of the gateway on many simulated engines.

    python -m benchmarks.routing.study --json > docs/results/routing.json
    python -m benchmarks.routing.study --page docs/results/routing.json

All engines run `slack`, and all routing policies see the same requests, predictions and estimates. The router is the
gateway's own. S is the capacity of `least_load`, the default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.command import AsJson, Duration, PageOf, Seeds, chosen, print_results, write_page
from benchmarks.markdown import table, wrapped
from lab.simulate.experiment import Experiment, Run, capacity, perform

KEEPS = 0.99
"""Adherence that defines a capacity."""

LOADS = (1.0, 2.0)
"""Offered rates as multiples of S, for the goodput."""

POLICY = "slack"
SLOTS = 1024
"""Sequences of an engine's batch. With the 256 of the profiles, slots limit the looser classes before time does."""

A100, H200 = "a100-llama3.1-8b", "h200-llama3.1-8b"

OURS, DEFAULT = "headroom", "least_load"


@dataclass(frozen=True, slots=True)
class Row:
    """One fleet and its traffic. ``first_qps``: first rate of the search (1/s). ``routings``: those compared."""

    name: str
    workload: str
    replicas: int
    profiles: tuple[str, ...]
    first_qps: float
    routings: tuple[str, ...]


MAIN = (DEFAULT, OURS, "least_requests")

ROWS = (
    Row("six categories, 8 A100", "sharegpt", 8, (), 200.0, (*MAIN, "round_robin", "power_of_two")),
    Row("multi-turn, 8 A100", "multi-turn", 8, (), 114.0, (*MAIN, "prefix_affinity")),
    Row("six categories, 4 A100", "sharegpt", 4, (), 98.0, MAIN),
    Row("six categories, 4 A100 and 4 H200", "sharegpt", 8, (H200,), 350.0, MAIN),
    Row("six categories, 16 A100", "sharegpt", 16, (), 410.0, MAIN),
)

FIELDS = ("goodput", "slo_adherence", "rejected", "hit_rate", "requests")
"""Fields of a run record that the results keep."""


def measure(
    row: Row, routing: str, seeds: list[int], duration_s: float, loads: Sequence[float], stock_qps: float | None
) -> dict[str, Any]:
    """Return the capacity (1/s) of ``routing``, its runs at ``loads`` times ``stock_qps`` (None: its own capacity)."""
    experiment = Experiment(
        profile=A100,
        workload={"name": row.workload, "duration_s": duration_s},
        replicas=row.replicas,
        routing=routing,
        profiles=row.profiles,
        limits={"max_num_seqs": SLOTS},
    )
    qps, _ = capacity(experiment, POLICY, seeds, KEEPS, precision=0.02, first_qps=row.first_qps, growth=1.1)
    runs = []
    for load in loads:
        for seed in seeds:
            record = perform(experiment, Run(POLICY, load * (stock_qps or qps), seed))
            runs.append({"load": load, "seed": seed, **{field: record[field] for field in FIELDS}})
    return {"routing": routing, "qps": round(qps, 1), "runs": runs}


def page(found: dict[str, Any]) -> str:
    """Return the result page of the study's JSON."""
    names, goodput, option = ", ".join(map(str, found["seeds"])), "", " --no-goodput"
    if any(one["runs"] for part in found["rows"] for one in part["routings"]):
        option = ""
        goodput = f"""- *S*: the capacity of `{DEFAULT}` in that row.
- *Goodput*: attained requests per second, drain included.
"""
    if len(found["rows"]) < len(ROWS):
        option += "".join(f' --row "{part["row"]}"' for part in found["rows"])
    head = f"""# Routing

**Simulated.** [Routing](../routing.md) explains the policies. Llama-3.1-8B, {found["slots"]} sequences a batch,
{found["duration_s"]:g} s of arrivals, seed {names}, the shipped length predictor. The policy of every engine is
`{POLICY}`. The six categories are those of the SCORPIO paper, with its `sharegpt` lengths.

- *Capacity*: the highest rate of the fleet at which {found["keeps"]:.0%} of the requests attain their SLO. The search
ends at a precision of 2%, so a search that starts at another rate may differ by that much.
- *Best other*: the highest capacity of the other policies. A ratio below 1 is a loss of `{OURS}`.
{goodput}
The CPU time of a decision is on the page about [routing](../routing.md#what-does-a-decision-cost).

```
python -m benchmarks.routing.study{option} --json > docs/results/routing.json
python -m benchmarks.routing.study --page docs/results/routing.json
```

## Capacity of `{OURS}`"""
    rows = []
    for part in found["rows"]:
        ours = next(one for one in part["routings"] if one["routing"] == OURS)
        best = max((one for one in part["routings"] if one is not ours), key=lambda one: float(one["qps"]))
        ratio = f"{ours['qps'] / best['qps']:.2f}x"
        rows.append([part["row"], f"{ours['qps']:.0f}", f"{best['qps']:.0f} (`{best['routing']}`)", ratio])
    summary = table(["fleet and traffic", f"`{OURS}`", "best other", "ratio"], rows)
    return "\n\n".join([wrapped(head), summary, *(text for part in found["rows"] for text in _section(part))]) + "\n"


def _section(part: dict[str, Any]) -> Iterator[str]:
    yield f"## {part['row'][0].upper()}{part['row'][1:]}"
    loads = list(dict.fromkeys(run["load"] for one in part["routings"] for run in one["runs"]))
    heads = ["routing", "capacity", "per engine", *(f"goodput at {load:g} S" for load in loads)]
    heads += [f"adherence at {load:g} S" for load in loads]
    rows = []
    for one in part["routings"]:
        by_load = [[run for run in one["runs"] if run["load"] == load] for load in loads]
        rows.append(
            [
                f"`{one['routing']}`",
                f"{one['qps']:.0f}",
                f"{one['qps'] / part['replicas']:.1f}",
                *(f"{fmean(run['goodput'] for run in runs):.0f}" for runs in by_load),
                *(f"{fmean(run['slo_adherence'] for run in runs):.2f}" for runs in by_load),
            ]
        )
    yield table(heads, rows)


def main(
    row: Annotated[list[str] | None, typer.Option(help="Simulate this row; repeat for several. [default: all]")] = None,
    routing: Annotated[
        list[str] | None, typer.Option(help="Only this routing policy; repeatable. [default: those of the row]")
    ] = None,
    seeds: Seeds = 1,
    duration: Duration = 30.0,
    goodput: Annotated[
        bool, typer.Option("--goodput/--no-goodput", help="Also run at multiples of S, which takes most of the time.")
    ] = True,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Simulate the routing policies on fleets of engines."""
    if page_of is not None:
        write_page(page_of, page)
        return
    names = chosen("--row", row, [one.name for one in ROWS])
    numbers, progress = list(range(seeds)), Console(stderr=True)
    parts = []
    for one in (one for one in ROWS if one.name in names):
        measured: list[dict[str, Any]] = []
        for name in routing or one.routings:
            stock_qps = measured[0]["qps"] if measured else None
            measured.append(measure(one, name, numbers, duration, LOADS if goodput else (), stock_qps))
            progress.print(f"{one.name}: {name}: {measured[-1]['qps']:g}/s")
        parts.append({"row": one.name, "replicas": one.replicas, "routings": measured})
    found = {"seeds": numbers, "duration_s": duration, "keeps": KEEPS, "slots": SLOTS, "rows": parts}
    print_results(found, as_json, page)


if __name__ == "__main__":
    typer.run(main)
