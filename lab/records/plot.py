"""Plots of run records: goodput and adherence against the offered rate, one line per policy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = dict[str, Any]

# Okabe and Ito's palette is safe for colour-blind readers. Markers differ too, for black-and-white print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"

_BOUNDS = {"count_bound": ("count bound", "--"), "fair_bound": ("fair bound", ":")}


FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Check that `plot_runs` can write ``path``, so that a command fails before a long run and not after it.

    Raises:
        ValueError: the file extension is not in `FORMATS`, or the folder does not exist.
        ModuleNotFoundError: matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot: {path.name!r} must end in one of {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: folder {path.parent} does not exist")
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plots need matplotlib: pip install -e '.[bench]' in your clone", name="matplotlib")


def plot_runs(runs: Sequence[Run], path: Path | str, title: str = "") -> None:
    """Draw ``runs`` (`lab.records.run_record.run_record`) to ``path``; its extension selects the format (`FORMATS`).

    Lines show the mean over seeds, bands the range. Bounds on adherence are dashed lines, if the runs have them.

    Raises:
        ValueError: no runs, or an unknown file extension.
        ModuleNotFoundError: matplotlib is missing; the message names the extra to install.
    """
    if not runs:
        raise ValueError("no runs to plot")
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install -e '.[bench]' in your clone") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with pyplot.rc_context(style):
        figure, (goodput, adherence) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        policies = list(dict.fromkeys(run["policy"] for run in runs))
        for axes, key in ((goodput, "goodput"), (adherence, "slo_adherence")):
            for index, policy in enumerate(policies):
                _line(axes, [run for run in runs if run["policy"] == policy], key, policy, index)
            axes.set_xlabel("offered requests per second")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(color="0.9", linewidth=0.8)
        _offered_line(goodput, runs)
        _bound_lines(adherence, runs)
        goodput.set_ylabel("goodput: attained requests per second")
        adherence.set_ylabel("SLO adherence: share of all requests")
        adherence.set_ylim(0, 1.04)
        # One legend for both panels; labels that both have appear once.
        lines = {
            label: line
            for axes in (goodput, adherence)
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 8), frameon=False)
        if title:
            figure.suptitle(title)
        try:
            figure.savefig(path, dpi=150)
        finally:
            pyplot.close(figure)


def _by_rate(runs: Sequence[Run], key: str) -> list[tuple[float, list[float]]]:
    """Return (rate, values of ``key`` over seeds), sorted by rate. Runs without the value are skipped."""
    values: dict[float, list[float]] = {}
    for run in runs:
        if run.get(key) is not None:
            values.setdefault(run["qps"], []).append(run[key])
    return sorted(values.items())


def _line(axes: Axes, runs: Sequence[Run], key: str, label: str, index: int) -> None:
    points = _by_rate(runs, key)
    if not points:
        return
    rates = [rate for rate, _ in points]
    colour = _COLOURS[index % len(_COLOURS)]
    axes.plot(
        rates,
        [statistics.mean(values) for _, values in points],
        color=colour,
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=5,
        linewidth=1.8,
        label=label,
    )
    if any(len(values) > 1 for _, values in points):
        lowest, highest = ([pick(values) for _, values in points] for pick in (min, max))
        axes.fill_between(rates, lowest, highest, color=colour, alpha=0.15, linewidth=0)


def _offered_line(axes: Axes, runs: Sequence[Run]) -> None:
    max_qps = max(run["qps"] for run in runs)
    axes.plot(
        [0, max_qps], [0, max_qps], color="0.6", linewidth=1, linestyle=(0, (1, 2)), label="all offered", zorder=1
    )


def _bound_lines(axes: Axes, runs: Sequence[Run]) -> None:
    for key, (label, dashes) in _BOUNDS.items():
        points = _by_rate(runs, key)
        if points:
            means = [statistics.mean(values) for _, values in points]
            axes.plot([rate for rate, _ in points], means, color="0.25", linewidth=1.3, linestyle=dashes, label=label)
