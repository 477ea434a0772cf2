"""Compares the routing policies of the gateway on many simulated engines.

    python -m benchmarks.routing.study --json docs/results/routing.json
    python -m benchmarks.routing.study --page docs/results/routing.json

All engines run `slack`, and all routing policies see the same requests, predictions and estimates. The router is the
gateway's own. S is the capacity of `least_load` in that row. The JSON file is written after each measurement, and a
study that was stopped continues from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Annotated, Any, TypeVar
from unittest import mock

import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import Duration, Jobs, JsonTo, PageOf, Seeds, chosen, write_page
from benchmarks.fleet import POLICY, SLOTS, fleet_of, fleet_run
from benchmarks.routing.page import page
from gateway.scheduling.routing import ROUTINGS, PrefixAffinity
from lab.simulate.experiment import capacity

T = TypeVar("T")

KEEPS = 0.99
"""Adherence that defines a capacity."""

PRECISION, FINE = 0.025, 0.004
"""Relative precision of a capacity, and where a ratio is close to the goal of 1.15. Three to six runs of each seed, if
the first rate of the search is close."""

LOADS = (1.0, 2.0)
"""Offered rates as multiples of S, for the goodput."""

H200 = "h200-llama3.1-8b"

SIX: dict[str, Any] = {"name": "sharegpt"}
MULTI_TURN: dict[str, Any] = {"name": "multi-turn"}
ONE_PACE: dict[str, Any] = {**SIX, "mix": {4: 1.0, 5: 1.0, 6: 1.0}}
"""The six categories, and those of them with 50 ms per token."""

OURS, DEFAULT = "headroom", "least_load"

POLICIES = (DEFAULT, OURS, "least_requests", "power_of_two", "round_robin", "most_free_memory")
"""Without shared prefixes, `prefix_affinity` is `least_requests`."""

VARIANTS = {
    f"prefix_affinity, {requests}, {ratio:g}": partial(PrefixAffinity, requests, ratio)
    for requests, ratio in ((32, 1.25), (16, 1.1), (8, 1.05))
}
"""`prefix_affinity` that balances earlier than by the defaults of SGLang, 64 requests and a ratio of 1.5."""

FIRST = {OURS: 1.17}
MIXED_FIRST = {OURS: 1.57, "round_robin": 0.6, "least_requests": 0.85, "power_of_two": 0.85, "most_free_memory": 0.85}
"""First rate of a policy's search, as a multiple of the row's. A rate close to the result saves runs."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fleet and its traffic. ``first_qps``: first rate of the search (1/s). ``routings``: those compared, S first.

    ``loads``: multiples of S at which goodput is measured, with the first seed. ``precision``: of the capacities.
    ``first``: see `FIRST`. ``trend``: only the first seed is measured.
    """

    name: str
    workload: dict[str, Any]
    replicas: int
    profiles: tuple[str, ...]
    first_qps: float
    routings: tuple[str, ...] = POLICIES
    loads: tuple[float, ...] = ()
    precision: float = PRECISION
    first: Mapping[str, float] = field(default_factory=lambda: FIRST)
    trend: bool = False


LINEAR_ROW, MIXED_ROW = "six categories, 8 A100", "six categories, 4 A100 and 4 H200"
TURNS_ROW = "multi-turn, 8 A100"
WITH_PREFIXES = (*POLICIES, "prefix_affinity", *VARIANTS)

ROWS = (
    Row("six categories, 2 A100", SIX, 2, (), 48.0),
    Row("six categories, 4 A100", SIX, 4, (), 97.0, loads=(0.5, *LOADS)),
    Row(LINEAR_ROW, SIX, 8, (), 200.0, precision=FINE),
    Row("six categories, 16 A100", SIX, 16, (), 410.0, loads=LOADS, trend=True),
    Row("one pace, 8 A100", ONE_PACE, 8, (), 256.0, (DEFAULT, OURS, "least_requests"), first={}, trend=True),
    Row("six categories, 2 A100 and 2 H200", SIX, 4, (H200,), 175.0, loads=LOADS, first=MIXED_FIRST, trend=True),
    Row(MIXED_ROW, SIX, 8, (H200,), 350.0, loads=LOADS, first=MIXED_FIRST, trend=True),
    Row("six categories, 8 A100 and 8 H200", SIX, 16, (H200,), 710.0, loads=LOADS, first=MIXED_FIRST, trend=True),
    Row("multi-turn, 4 A100", MULTI_TURN, 4, (), 56.0, WITH_PREFIXES, LOADS, trend=True),
    Row(TURNS_ROW, MULTI_TURN, 8, (), 113.0, WITH_PREFIXES, LOADS),
    Row("multi-turn, 16 A100", MULTI_TURN, 16, (), 228.0, WITH_PREFIXES, LOADS, trend=True),
)


@dataclass(frozen=True, slots=True)
class Large:
    """One run of ``replicas`` engines, at ``load`` times the capacity per engine that ``of`` has in the row.

    ``duration_s``: of the arrivals (s); None: that of the study. ``row``: of `ROWS`, whose traffic and profiles it has.
    """

    replicas: int
    routing: str
    load: float
    of: str
    duration_s: float | None = None
    row: str = LINEAR_ROW

    @property
    def key(self) -> dict[str, Any]:
        """The fields that identify the run in the results."""
        return {
            "row": self.row,
            "replicas": self.replicas,
            "routing": self.routing,
            "load": self.load,
            "of": self.of,
        }

    def fields(self, duration_s: float) -> dict[str, Any]:
        """`key` and the seconds of arrivals, in a study of ``duration_s``."""
        return {**self.key, "duration_s": self.duration_s or duration_s}


MORE = "more engines"
"""Name of the runs of `LARGE` among the rows."""

NEAR_LINEAR = 0.95

SHORT_S = 12.0
"""Seconds of arrivals of runs that are compared with each other only, where 30 s would take over 5 minutes of CPU.

The load still grows at the end."""

LARGE = (
    *(Large(replicas, OURS, NEAR_LINEAR, OURS, row=row) for row in (LINEAR_ROW, MIXED_ROW) for replicas in (64, 256)),
    *(Large(64, routing, load, DEFAULT) for load in LOADS for routing in POLICIES),
    *(Large(64, routing, load, DEFAULT, SHORT_S, MIXED_ROW) for load in LOADS for routing in POLICIES),
    *(Large(256, routing, load, DEFAULT, SHORT_S) for load in LOADS for routing in POLICIES),
    *(
        Large(replicas, routing, load, DEFAULT, duration_s, TURNS_ROW)
        for replicas, duration_s in ((64, None), (256, SHORT_S))
        for load in LOADS
        for routing in (*POLICIES, "prefix_affinity")
    ),
    *(Large(256, routing, load, DEFAULT, SHORT_S, MIXED_ROW) for load in LOADS for routing in POLICIES),
)

FIELDS = ("slo_adherence", "rejected", "hit_rate", "requests")
"""Fields of a run record that the results keep."""


def measure(row: Row, routing: str, seed: int, duration_s: float) -> dict[str, Any]:
    """Return the capacity (1/s) of ``routing`` with ``seed``."""
    experiment = fleet_of(row.workload, duration_s, row.replicas, routing, row.profiles)
    started = time.process_time()
    qps, tried = capacity(
        experiment,
        POLICY,
        [seed],
        KEEPS,
        precision=row.precision,
        first_qps=row.first_qps * row.first.get(routing, 1.0),
        growth=1.05,
    )
    requests = sum(record["requests"] for record in tried)
    return {
        "routing": routing,
        "seed": seed,
        "qps": round(qps, 1),
        "routing_us": round(1e6 * sum(record["routing_s"] for record in tried) / requests, 1),
        "cpu_s": round(time.process_time() - started, 1),
    }


def measure_load(row: Row, routing: str, load: float, stock_qps: float, duration_s: float) -> dict[str, Any]:
    """Return one run of ``routing`` at ``load`` times ``stock_qps`` (1/s), with the first seed."""
    experiment = fleet_of(row.workload, duration_s, row.replicas, routing, row.profiles)
    return {"routing": routing, "load": load, **fleet_run(experiment, load * stock_qps, 0, FIELDS)}


def measure_large(large: Large, parts: list[dict[str, Any]], duration_s: float) -> dict[str, Any]:
    """Return the run of ``large``."""
    part = next(part for part in parts if part["row"] == large.row)
    row = next(row for row in ROWS if row.name == large.row)
    qps = fmean(one["qps"] for one in part["found"] if one["routing"] == large.of) / part["replicas"]
    rate = large.load * qps * large.replicas
    fields = large.fields(duration_s)
    experiment = fleet_of(row.workload, fields["duration_s"], large.replicas, large.routing, row.profiles)
    return {**fields, "qps": round(rate, 1), **fleet_run(experiment, rate, 0, FIELDS)}


def main(
    row: Annotated[
        list[str] | None, typer.Option(help=f'Simulate this row, or "{MORE}"; repeat for several. [default: all]')
    ] = None,
    routing: Annotated[
        list[str] | None, typer.Option(help="Simulate this policy; repeat for several. [default: all of the row]")
    ] = None,
    seeds: Seeds = 3,
    duration: Duration = 30.0,
    jobs: Jobs = 1,
    json_to: JsonTo = None,
    page_of: PageOf = None,
) -> None:
    """Simulate the routing policies on fleets of engines. All of it takes hours of CPU time."""
    if page_of is not None:
        write_page(page_of, page)
        return
    names, progress = chosen("--row", row, [*(one.name for one in ROWS), MORE]), Console(stderr=True)
    routings = chosen("--routing", routing, [*ROUTINGS, *VARIANTS])
    found: dict[str, Any] = {"duration_s": duration, "keeps": KEEPS, "slots": SLOTS, "rows": [], "large": []}
    found |= results_json.read(json_to)
    rows = [known for known in ROWS if known.name in names]
    large = [one for one in LARGE if MORE in names and one.routing in routings]
    with mock.patch.dict(ROUTINGS, VARIANTS):
        for done in _measured(found, rows, large, routings, seeds, jobs):
            results_json.write(found, json_to)
            progress.print(done)
    if json_to is None:
        typer.echo(page(found), nl=False)


def _measured(
    found: dict[str, Any], rows: list[Row], large: list[Large], routings: list[str], seeds: int, jobs: int
) -> Iterator[str]:
    """Measure what ``found`` lacks, and yield what was measured each time that it grows."""
    duration_s = found["duration_s"]
    parts = [(row, name, _part(found["rows"], row)) for row in rows for name in row.routings if name in routings]
    searches = [
        (row, name, seed, part)
        for seed in range(seeds)
        for row, name, part in parts
        if not (row.trend and seed)
        if not any((one["routing"], one["seed"]) == (name, seed) for one in part["found"])
    ]
    calls = [partial(measure, row, name, seed, duration_s) for row, name, seed, _ in searches]
    for (row, name, seed, part), one in _done(searches, calls, jobs):
        _insert(part["found"], one, row.routings)
        yield f"{row.name}: {name}, seed {seed}: {one['qps']:g}/s"

    runs = [
        (row, name, load, part)
        for row, name, part in parts
        for load in row.loads
        if not any((run["routing"], run["load"]) == (name, load) for run in part["runs"])
    ]
    calls = [partial(measure_load, row, name, load, _stock_qps(part), duration_s) for row, name, load, part in runs]
    for (row, name, load, part), run in _done(runs, calls, jobs):
        _insert(part["runs"], run, row.routings)
        yield f"{row.name}: {name} at {load:g} S: {run['goodput']:g}/s"

    keys = [more.key for more in LARGE]
    missing = [
        more for more in large if not any(known.items() >= more.fields(duration_s).items() for known in found["large"])
    ]
    calls = [partial(measure_large, more, found["rows"], duration_s) for more in missing]
    for more, run in _done(missing, calls, jobs):
        # It replaces a run with other seconds of arrivals.
        found["large"] = [known for known in found["large"] if not known.items() >= more.key.items()]
        found["large"].append(run)
        found["large"].sort(key=lambda run: keys.index({name: run[name] for name in keys[0]}))
        yield f"{more.replicas} engines, {more.routing} at {more.load:g}: {run['slo_adherence']:.4f}"


def _done(
    items: Sequence[T], calls: Sequence[Callable[[], dict[str, Any]]], jobs: int
) -> Iterator[tuple[T, dict[str, Any]]]:
    """Yield each item with the result of its call, as the calls end. ``jobs`` processes compute them."""
    if jobs == 1:
        yield from ((item, call()) for item, call in zip(items, calls, strict=True))
        return
    with ProcessPoolExecutor(jobs, initializer=_add_variants) as pool:
        running = {pool.submit(call): item for item, call in zip(items, calls, strict=True)}
        for future in as_completed(running):
            yield running[future], future.result()


def _add_variants() -> None:
    ROUTINGS.update(VARIANTS)


def _insert(known: list[dict[str, Any]], one: dict[str, Any], routings: Sequence[str]) -> None:
    """Add ``one`` in the order of seeds and ``routings``, since calls end in any order."""
    known.append(one)
    known.sort(key=lambda one: (one.get("seed", 0), routings.index(one["routing"]), one.get("load", 0.0)))


def _stock_qps(part: dict[str, Any]) -> float:
    """Return S, with the first seed."""
    return float(next(one["qps"] for one in part["found"] if one["routing"] == DEFAULT))


def _part(parts: list[dict[str, Any]], row: Row) -> dict[str, Any]:
    """Return the results of ``row`` among ``parts``; adds empty ones in the order of `ROWS`."""
    for part in parts:
        if part["row"] == row.name:
            return part
    part = {"row": row.name, "replicas": row.replicas, "precision": row.precision, "found": [], "runs": []}
    parts.append(part)
    order = [one.name for one in ROWS]
    parts.sort(key=lambda one: order.index(one["row"]))
    return part


if __name__ == "__main__":
    typer.run(main)
