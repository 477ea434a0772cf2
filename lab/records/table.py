"""Run records as a terminal table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

_Cell = Callable[[dict[str, Any]], str]

_COLUMNS: dict[str, _Cell] = {
    "offered\n/s": lambda run: f"{run['qps']:.4g}",
    "goodput\n/s": lambda run: "-" if run["goodput"] is None else f"{run['goodput']:.2f}",
    "adher-\nence": lambda run: _share(run["slo_adherence"]),
    "re-\njected": lambda run: _share(run["rejected"]),
    "failed": lambda run: _share(run["failed"]),
    "TTFT\nviol.": lambda run: _share(run["ttft_violations"]),
    "TPOT\nviol.": lambda run: _share(run["tpot_violations"]),
    "TTFT ms\np50/p99": lambda run: f"{_ms(run['ttft_p50_s'])}/{_ms(run['ttft_p99_s'])}",
    "TPOT ms\np50/p99": lambda run: f"{_ms(run['tpot_p50_s'])}/{_ms(run['tpot_p99_s'])}",
}


def runs_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one row per run record (`lab.records.run_record.run_record`); it fits 112 columns."""
    columns = dict(_COLUMNS)
    if any(run.get("count_bound") is not None for run in runs):
        columns["bounds\ncount/fair"] = lambda run: f"{_share(run['count_bound'])}/{_share(run['fair_bound'])}"
    if len({run["seed"] for run in runs}) > 1:
        columns = {"seed": lambda run: str(run["seed"]), **columns}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("policy", overflow="fold", min_width=8)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(run["policy"], *(cell(run) for cell in columns.values()))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.0f}"
