"""How the figures look: one style, and one colour a policy throughout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures.records import Record, mean, of, policies, rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette, which the colour-blind can tell apart; markers differ too, for print.
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


@contextmanager
def canvas(
    path: Path, title: str, rows: int, columns: int, size: tuple[float, float], *, simulated: bool = True
) -> Iterator[tuple[Canvas, Any]]:
    """A figure and its axes, shape (rows, columns), saved as ``path`` at the end; says whether it is simulated.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message names the extra that brings it.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'antares-gateway[bench]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        try:
            yield figure, axes
            figure.suptitle(f"SIMULATED · {title}" if simulated else title, fontsize=11)
            # No date and no version inside: the same data makes the same file.
            figure.savefig(path, dpi=120, metadata={"Software": None})
        finally:
            pyplot.close(figure)


def legend(figure: Canvas, axes: Sequence[Axes]) -> None:
    """One legend below all axes; a label that several have appears once."""
    lines = {label: line for one in axes for line, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 7), frameon=False)


def over_rates(axes: Axes, runs: Sequence[Record], key: str) -> None:
    """A line a policy: ``key`` over the offered rate, mean over seeds, the band around it their range."""
    for policy in policies(runs):
        own = of(runs, policy=policy)
        offered = rates(own)
        at = [of(own, qps=qps) for qps in offered]
        colour, marker = look(policy)
        varied = ":" in policy
        axes.plot(
            offered,
            [mean(records, key) for records in at],
            color=colour,
            marker=marker,
            markersize=5,
            markerfacecolor="white" if varied else colour,
            linestyle="--" if varied else "-",
            linewidth=1.7,
            label="fcfs (stock vLLM)" if policy == "fcfs" else policy,
        )
        if any(len(records) > 1 for records in at):
            least, most = ([pick(r[key] for r in records) for records in at] for pick in (min, max))
            axes.fill_between(offered, least, most, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("offered requests per second")
    axes.set_ylim(bottom=0)


def bounds_over_rates(axes: Axes, runs: Sequence[Record]) -> None:
    """The bounds on adherence that no policy can pass."""
    offered = rates(runs)
    for key, label, dashes in (("count_bound", "count bound", "--"), ("fair_bound", "fair bound", ":")):
        heights = [mean(of(runs, qps=qps), key) for qps in offered]
        axes.plot(offered, heights, color="0.25", linewidth=1.2, linestyle=dashes, label=label, zorder=1)
    axes.set_ylim(0, 1.04)
