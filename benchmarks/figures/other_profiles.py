"""SCORPIO's figure 4 on the other profiles of an A100, in both step modes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures.drawing import canvas, legend, plot_bounds_over_rates, plot_over_rates
from benchmarks.figures.figure import Document, Figure, new_document
from benchmarks.figures.lab import Lab
from benchmarks.figures.qps_scaling import AUTHORS_BUDGET
from benchmarks.figures.records import Record, compare, factor_text, matching, mean, policies_of, rates_of
from benchmarks.markdown import policy_label, table
from lab.simulate.experiment import Experiment, Run

NAME = "other_profiles"
POLICIES = ("fcfs", "s3", "mooncake", "scorpio")
CAUTIOUS = "scorpio:eta=1.6"
"""Run where prefills stop all decodes: a larger eta is SCORPIO's only allowance for that."""
MIN_LEAD = 1.0
"""Smallest lead, in points of adherence, that the page reports."""
SEEDS = (0, 1)
DURATION_S = 60.0


@dataclass(frozen=True, slots=True)
class Panel:
    """A profile in a step mode, with offered rates from light load to collapse."""

    profile: str
    step_mode: str
    rates: tuple[float, ...]
    policies: tuple[str, ...] = POLICIES

    def experiment(self, duration_s: float) -> Experiment:
        """The experiment: chunked prefill with the profile's token budget, prefill-first with the authors' budget."""
        limits = {} if self.step_mode == "chunked" else dict(AUTHORS_BUDGET)
        return Experiment(
            self.profile, {"name": "sharegpt", "duration_s": duration_s}, step_mode=self.step_mode, limits=limits
        )


PANELS = (
    Panel("niyama-a100", "chunked", (5, 10, 15, 20, 30, 40)),
    Panel("a100-llama3.1-8b", "chunked", (10, 20, 30, 40, 50, 60)),
    Panel("a100-llama3.1-8b", "prefill-first", (10, 15, 20, 30, 40, 60), (*POLICIES, CAUTIOUS)),
    Panel("blis-a100", "chunked", (10, 20, 30, 40, 50, 60)),
    Panel("blis-a100", "prefill-first", (10, 15, 20, 30, 40, 60), (*POLICIES, CAUTIOUS)),
)


def measure(lab: Lab, quick: bool) -> Document:
    """Run every policy at every rate and seed of all panels."""
    seeds = (0,) if quick else SEEDS
    tasks = [
        (panel.experiment(1.0 if quick else DURATION_S), Run(policy, float(qps), seed))
        for panel in PANELS
        for policy in panel.policies
        for qps in (panel.rates[:1] if quick else panel.rates)
        for seed in seeds
    ]
    profiles = tuple(dict.fromkeys(panel.profile for panel in PANELS))
    return new_document(NAME, seeds, profiles, runs=lab.runs("Other profiles", tasks))


def _runs_of(panel: Panel, runs: list[Record]) -> list[Record]:
    return matching(runs, profile=panel.profile, step_mode=panel.step_mode)


def draw(document: Document, folder: Path) -> list[str]:
    """Draw one column per panel: goodput above, adherence below."""
    with canvas(folder / f"{NAME}.png", "ShareGPT lengths, the paper's SLOs", 2, len(PANELS), (17, 6.6)) as (
        figure,
        axes,
    ):
        for column, panel in enumerate(PANELS):
            own = _runs_of(panel, document["runs"])
            goodput, adherence = axes[0][column], axes[1][column]
            plot_over_rates(goodput, own, "goodput")
            plot_over_rates(adherence, own, "slo_adherence")
            plot_bounds_over_rates(adherence, own)
            goodput.set_title(f"{panel.profile}, {panel.step_mode}")
            goodput.set_xlabel("")
        axes[0][0].set_ylabel("goodput, attained/s")
        axes[1][0].set_ylabel("SLO adherence")
        legend(figure, [*axes[0], *axes[1]])
    return [f"{NAME}.png"]


def section(document: Document) -> str:
    """One table per panel, and the panels in which a baseline leads."""
    parts = [
        f"""**Paper.** One engine. **Here.** The same policies on three profiles of the same card, whose step times
differ by 2x and more ([profiles](../profiles.md)). Both step modes: chunked prefill with budget 2048, as in current
vLLM, and prefill-first with budget 1024, as in vLLM 0.6. {DURATION_S:g} s of Poisson arrivals,
{len(document["seeds"])} seeds.

![Goodput and adherence on five engines]({NAME}.png)

Adherence, mean over the seeds. The last column compares goodput and adherence of `scorpio` with those of stock vLLM."""
    ]
    for panel in PANELS:
        own = _runs_of(panel, document["runs"])
        names = policies_of(own)
        rows = []
        for qps in rates_of(own):
            at_rate = matching(own, qps=qps)
            factor, points = compare(at_rate, "scorpio", "fcfs")
            cells = [f"{mean(matching(at_rate, policy=p), 'slo_adherence'):.2f}" for p in names]
            bounds = f"{mean(at_rate, 'count_bound'):.2f} / {mean(at_rate, 'fair_bound'):.2f}"
            rows.append([f"{qps:g}", *cells, bounds, f"{factor_text(factor)}, {points:+.1f} points"])
        heads = ["offered/s", *map(policy_label, names), "count / fair bound", "`scorpio` over stock"]
        parts.append(f"`{panel.profile}`, {panel.step_mode}:\n\n{table(heads, rows)}")
    parts.append(_reading(document["runs"]))
    return "\n\n".join(parts) + "\n"


def _reading(runs: list[Record]) -> str:
    rows = []
    for panel in PANELS:
        own = _runs_of(panel, runs)
        for qps in rates_of(own):
            at_rate = matching(own, qps=qps)
            adherence = {policy: mean(matching(at_rate, policy=policy), "slo_adherence") for policy in POLICIES}
            best = max(adherence, key=lambda policy: adherence[policy])
            lead = 100 * (adherence[best] - adherence["scorpio"])
            if lead > MIN_LEAD:
                late, rejected = (
                    f"{mean(matching(at_rate, policy='scorpio'), key):.0%}" for key in ("tpot_violations", "rejected")
                )
                engine = f"`{panel.profile}`, {panel.step_mode}"
                rows.append([engine, f"{qps:g}", f"`{best}` by {lead:.0f} points", late, rejected])
    if not rows:
        return f"**Where SCORPIO loses.** No other policy leads `scorpio` by more than {MIN_LEAD:g} point anywhere."
    heads = ["engine", "offered/s", "best baseline, lead", "`scorpio`: TPOT violations", "`scorpio`: rejected"]
    return f"""**Where SCORPIO loses.** A baseline leads by more than {MIN_LEAD:g} point of adherence in these rows:

{table(heads, rows)}

Where many TPOT bounds are violated: SCORPIO's TPOT estimate is eta times the time of a step that only decodes. In
prefill-first mode decodes stop during prefills, for a share of the time that the constant eta (1.3) does not capture.
With eta 1.6 (dashed) nearly all requests meet their TPOT bound, at the price of rejections at lower rates. The credits
make it worse: they slow a request with a loose bound down to exactly that bound, which leaves no slack for the next
prefill.

Where no TPOT bound is violated, `scorpio` rejects requests that others serve in time. Eta is too cautious there, and
the strictest running request decides for all.

`mooncake` collapses on the fastest engines at the highest rates. It does not check the free slots of the batch
(`max_num_seqs` 256), so admitted requests wait inside the engine for a slot.

On `blis-a100` with chunked prefill, steps hardly grow with context and batch. No policy violates TPOT there, and
shortest first, which rejects nothing, frees slots fastest."""


def headline(document: Document) -> str:
    """The range of SCORPIO's gain over stock vLLM."""
    points = [
        compare(matching(own, qps=qps), "scorpio", "fcfs")[1]
        for own in (_runs_of(panel, document["runs"]) for panel in PANELS)
        for qps in rates_of(own)
    ]
    return (
        f"`scorpio` has {min(points):+.0f} to {max(points):+.0f} points of adherence against stock vLLM, depending on "
        "engine and rate"
    )


FIGURE = Figure(NAME, "Other step times and step modes", measure, draw, section, headline)
