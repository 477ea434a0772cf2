"""Plot of a search for the number of replicas: adherence against replicas, and the run with the answer over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def plot_sizing(
    tried: Mapping[str, Mapping[int, float]],
    timelines: Mapping[str, Sequence[Mapping[str, Any]]],
    target: float,
    path: Path,
    title: str,
) -> None:
    """Draw to ``path``, whose extension `lab.records.plot.check_plot` has checked.

    Args:
        tried: policy to number of replicas to adherence.
        timelines: policy to `lab.records.timeline.timeline` of the run with the answer. The first one is drawn.
        target: adherence that was asked for.
        path, title: of the figure.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with pyplot.rc_context(style):
        figure, (size, over_time) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for index, (policy, measured) in enumerate(tried.items()):
            points = sorted(measured.items())
            size.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[index % len(_COLOURS)], label=policy)
        size.axhline(target, color="0.4", linewidth=1, linestyle="--", label=f"target {target:g}")
        size.xaxis.get_major_locator().set_params(integer=True)
        size.set(xlabel="replicas", ylabel="SLO adherence: share of all requests", ylim=(0, 1.04))
        size.legend(frameon=False, loc="lower right")
        for policy, bins in list(timelines.items())[:1]:
            at_s = [part["at_s"] / 60 for part in bins]
            over_time.step(at_s, [part["arrivals"] for part in bins], where="post", color="0.6", label="arrivals")
            attained = [part["attained"] for part in bins]
            over_time.step(at_s, attained, where="post", color=_COLOURS[0], label=f"attained, {policy}")
            shares = over_time.twinx()
            points = [(at, part["slo_adherence"]) for at, part in zip(at_s, bins, strict=True) if part["arrivals"]]
            shares.plot(*zip(*points, strict=True), color=_COLOURS[1], linewidth=1, label="adherence")
            shares.set(ylabel="SLO adherence", ylim=(0, 1.04))
            lines = [axes.get_legend_handles_labels() for axes in (over_time, shares)]
            over_time.legend(lines[0][0] + lines[1][0], lines[0][1] + lines[1][1], frameon=False, loc="lower right")
        over_time.set(xlabel="minutes", ylabel="requests per second", ylim=(0, None))
        for axes in (size, over_time):
            axes.grid(color="0.9", linewidth=0.8)
        figure.suptitle(title)
        try:
            figure.savefig(path, dpi=150)
        finally:
            pyplot.close(figure)
