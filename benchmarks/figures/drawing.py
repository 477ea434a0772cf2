"""Shared style of the figures: one colour and marker per policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures.records import Record, matching, mean, policies_of, rates_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# The Okabe-Ito palette is safe for colour-blind readers. Markers differ too, for print.
_LOOKS = {
    "fcfs": ("#0072B2", "o"),
    "s3": ("#D55E00", "s"),
    "mooncake": ("#009E73", "D"),
    "scorpio": ("#CC79A7", "^"),
    "ttft_guard_only": ("#E69F00", "v"),
    "tpot_guard_only": ("#56B4E9", "P"),
    "slack": ("#000000", "X"),
    "annealing": ("#8C6D31", "*"),
}
_SPARE = (("#555555", "h"), ("#7B3294", "<"), ("#A6611A", ">"))

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.8,
}


def look(policy: str) -> tuple[str, str]:
    """Colour and marker of a policy."""
    base = policy.partition(":")[0]
    return _LOOKS.get(base) or _SPARE[sum(map(ord, base)) % len(_SPARE)]


def plot_label(policy: str) -> str:
    """The name of a policy in a legend."""
    return "fcfs (stock vLLM)" if policy == "fcfs" else policy


@contextmanager
def canvas(
    path: Path, title: str, rows: int, columns: int, size: tuple[float, float], *, simulated: bool = True
) -> Iterator[tuple[Canvas, Any]]:
    """A figure and its axes, shape (rows, columns). Saves it as ``path`` on exit, and marks it if simulated.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message names the extra that installs it.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install -e '.[bench]' in your clone") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        try:
            yield figure, axes
            figure.suptitle(f"SIMULATED · {title}" if simulated else title, fontsize=11)
            # Without date and version in the metadata, the same data writes the same file.
            figure.savefig(path, dpi=120, metadata={"Software": None})
        finally:
            pyplot.close(figure)


def legend(figure: Canvas, axes: Sequence[Axes]) -> None:
    """Draw one legend below all axes; each label appears once."""
    lines = {label: line for one in axes for line, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 7), frameon=False)


def plot_over_rates(axes: Axes, runs: Sequence[Record], key: str) -> None:
    """Plot ``key`` over the offered rate: one line per policy (mean over seeds) in a band (their range)."""
    for policy in policies_of(runs):
        own = matching(runs, policy=policy)
        offered = rates_of(own)
        by_rate = [matching(own, qps=qps) for qps in offered]
        colour, marker = look(policy)
        has_options = ":" in policy
        axes.plot(
            offered,
            [mean(records, key) for records in by_rate],
            color=colour,
            marker=marker,
            markersize=5,
            markerfacecolor="white" if has_options else colour,
            linestyle="--" if has_options else "-",
            linewidth=1.7,
            label=plot_label(policy),
        )
        if any(len(records) > 1 for records in by_rate):
            low, high = ([pick(r[key] for r in records) for records in by_rate] for pick in (min, max))
            axes.fill_between(offered, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("offered requests per second")
    axes.set_ylim(bottom=0)


def plot_bounds_over_rates(axes: Axes, runs: Sequence[Record]) -> None:
    """Plot the upper bounds on adherence (`lab.bounds`) over the offered rate."""
    offered = rates_of(runs)
    for key, label, dashes in (("count_bound", "count bound", "--"), ("fair_bound", "fair bound", ":")):
        heights = [mean(matching(runs, qps=qps), key) for qps in offered]
        axes.plot(offered, heights, color="0.25", linewidth=1.2, linestyle=dashes, label=label, zorder=1)
    axes.set_ylim(0, 1.04)
