"""Prints the results of `antares simulate` as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from lab.simulate.experiment import MAX_QPS, Experiment
from lab.simulate.replica_search import MAX_REPLICAS, Sizing

_COLUMNS = {
    "goodput": "goodput /s",
    "slo_adherence": "adherence",
    "rejected": "rejected",
    "ttft_violations": "TTFT viol.",
    "tpot_violations": "TPOT viol.",
    "ttft_p50_s": "TTFT p50 s",
    "tpot_p50_s": "TPOT p50 s",
    "count_bound": "count bound",
    "fair_bound": "fair bound",
}
"""Key of the run record to header of the table."""

_PREFIX_COLUMNS = {"predicted_hit_rate": "predicted hits", "hit_rate": "hits"}
"""Columns of a workload with shared prefixes: shares of the prompt tokens."""

_SIZING_COLUMNS = {
    "slo_adherence": "adherence",
    "rejected": "rejected",
    "goodput": "goodput /s",
    "ttft_p99_s": "TTFT p99 s",
    "tpot_p99_s": "TPOT p99 s",
    "utilisation": "busy",
}
"""Columns of a search for the number of replicas."""


def print_runs(document: dict[str, Any], experiment: Experiment, hold: float | None) -> None:
    """Print the runs of ``document``, or the capacities that keep the adherence ``hold``."""
    out = _console()
    if hold is not None:
        for policy, rate in document["capacity_qps"].items():
            at_least = "at least " if rate >= MAX_QPS else ""
            out.print(
                f"{policy}: {at_least}{rate:g} requests/s at {hold:.0%} SLO adherence "
                f"({experiment.profile}, {experiment.workload['name']})"
            )
        return
    runs = document["runs"]
    table = Table(title=f"{experiment.profile}, {experiment.workload['name']}, {experiment.step_mode} steps")
    columns = dict(_COLUMNS)
    if any(run["hit_rate"] is not None for run in runs):
        columns |= _PREFIX_COLUMNS
    for header in ("policy", "offered /s", *columns.values()):
        table.add_column(header, justify="left" if header == "policy" else "right")
    for policy, rate in dict.fromkeys((run["policy"], run["qps"]) for run in runs):
        over_seeds = [run for run in runs if (run["policy"], run["qps"]) == (policy, rate)]
        table.add_row(policy, f"{rate:g}", *(_mean([run[key] for run in over_seeds]) for key in columns))
    out.print(table)
    if len({run["seed"] for run in runs}) > 1:
        out.print("Means over seeds; --json prints each run.")


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"


def print_sizings(sizings: Mapping[str, Sizing], experiment: Experiment, target: float) -> None:
    """Print the fewest replicas of each policy that keep ``target``, what was tried, and the adherence per class."""
    out = _console()
    profiles = " and ".join((experiment.profile, *experiment.profiles))
    for policy, sizing in sizings.items():
        rate, requests = (statistics.fmean(record[key] for record in sizing.records) for key in ("qps", "requests"))
        engines = f"{'replica' if sizing.replicas == 1 else 'replicas'} of {profiles}"
        # The seconds show a wrong unit of a trace's times.
        traffic = f"{rate:.4g} requests/s ({requests:,.0f} in {requests / rate:.3g} s)"
        if sizing.replicas is None:
            out.print(f"{policy}: not even {MAX_REPLICAS} {engines} keep {target:.0%} of the SLOs at {traffic}")
        else:
            found = f"{sizing.tried[sizing.replicas]:.4f}"
            out.print(
                f"{policy}: {sizing.replicas} {engines} for {traffic} at {target:.0%} SLO adherence (measured {found})"
            )
        if sizing.saturated:
            out.print("More replicas do not help: these are mostly idle, and the target is not attained.")
        if sizing.feasible < 1:
            out.print(
                f"An idle engine misses the bounds of {1 - sizing.feasible:.1%} of the requests, prefix caching aside."
            )
        table = Table()
        for header in ("replicas", *_SIZING_COLUMNS.values()):
            table.add_column(header, justify="right")
        for replicas in sorted(sizing.tried):
            of = [record for record in sizing.records if record["replicas"] == replicas]
            table.add_row(str(replicas), *(_mean([record[key] for record in of]) for key in _SIZING_COLUMNS))
        out.print(table)
        if sizing.replicas is not None:
            _print_classes(out, [record for record in sizing.records if record["replicas"] == sizing.replicas])


def _print_classes(out: Console, records: list[dict[str, Any]]) -> None:
    table = Table()
    for header in ("class", "requests", "adherence", "TTFT p99 s", "TPOT p99 s"):
        table.add_column(header, justify="left" if header == "class" else "right")
    for name in records[0]["per_class"]:
        of = [record["per_class"][name] for record in records if name in record["per_class"]]
        keys = ("slo_adherence", "ttft_p99_s", "tpot_p99_s")
        label = records[0].get("class_names", {}).get(name, name)
        requests = str(sum(record["requests"] for record in of))
        table.add_row(label, requests, *(_mean([record[key] for record in of]) for key in keys))
    out.print(table)


def _console() -> Console:
    out = Console(highlight=False)
    # Rich assumes 80 columns for a pipe, which would truncate the table.
    return out if out.is_terminal else Console(highlight=False, width=160)
