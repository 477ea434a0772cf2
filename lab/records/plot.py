"""Run records as a picture: goodput and adherence against the offered rate, one line a policy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = dict[str, Any]

# Okabe and Ito's palette, which the colour-blind can tell apart; markers differ too, for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"

_BOUNDS = {"count_bound": ("count bound", "--"), "fair_bound": ("fair bound", ":")}


FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Whether `plot_runs` can write ``path``: before a long run, not after it.

    Raises:
        ValueError: its ending is no format, or it has no folder.
        ModuleNotFoundError: matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot writes {', '.join(FORMATS)}; {path.name!r} is none of them")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'antares-gateway[bench]'", name="matplotlib")


def plot_runs(runs: Sequence[Run], path: Path | str, title: str = "") -> None:
    """Draw ``runs`` (`lab.records.run_record.run_record`) into ``path``; its ending says the format (.png, .svg, .pdf).

    A line is the mean over seeds, the band around it the range. Bounds on adherence are dashed where runs have them.

    Raises:
        ValueError: no runs, or an ending that is no format.
        ModuleNotFoundError: matplotlib is missing; the message names the extra that brings it.
    """
    if not runs:
        raise ValueError("no runs to plot")
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'antares-gateway[bench]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with pyplot.rc_context(style):
        figure, (goodput, adherence) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        policies = list(dict.fromkeys(run["policy"] for run in runs))
        for axes, key in ((goodput, "goodput"), (adherence, "slo_adherence")):
            for place, policy in enumerate(policies):
                _line(axes, [run for run in runs if run["policy"] == policy], key, policy, place)
            axes.set_xlabel("offered requests per second")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(color="0.9", linewidth=0.8)
        _offered(goodput, runs)
        _bounds(adherence, runs)
        goodput.set_ylabel("goodput: attained requests per second")
        adherence.set_ylabel("SLO adherence: share of all requests")
        adherence.set_ylim(0, 1.04)
        # One legend for both; a label that both panels have appears once.
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
    """(rate, values of ``key`` over the seeds) in order of the rate; runs that lack the value are left out."""
    found: dict[float, list[float]] = {}
    for run in runs:
        if run.get(key) is not None:
            found.setdefault(run["qps"], []).append(run[key])
    return sorted(found.items())


def _line(axes: Axes, runs: Sequence[Run], key: str, label: str, place: int) -> None:
    points = _by_rate(runs, key)
    if not points:
        return
    rates = [rate for rate, _ in points]
    colour = _COLOURS[place % len(_COLOURS)]
    axes.plot(
        rates,
        [statistics.mean(values) for _, values in points],
        color=colour,
        marker=_MARKERS[place % len(_MARKERS)],
        markersize=5,
        linewidth=1.8,
        label=label,
    )
    if any(len(values) > 1 for _, values in points):
        least, most = ([pick(values) for _, values in points] for pick in (min, max))
        axes.fill_between(rates, least, most, color=colour, alpha=0.15, linewidth=0)


def _offered(axes: Axes, runs: Sequence[Run]) -> None:
    most = max(run["qps"] for run in runs)
    axes.plot([0, most], [0, most], color="0.6", linewidth=1, linestyle=(0, (1, 2)), label="all offered", zorder=1)


def _bounds(axes: Axes, runs: Sequence[Run]) -> None:
    for key, (label, dashes) in _BOUNDS.items():
        points = _by_rate(runs, key)
        if points:
            means = [statistics.mean(values) for _, values in points]
            axes.plot([rate for rate, _ in points], means, color="0.25", linewidth=1.3, linestyle=dashes, label=label)
