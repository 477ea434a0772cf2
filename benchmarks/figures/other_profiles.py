"""SCORPIO's figure 4 on the other profiles of an A100, in both step modes, as it comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures.drawing import bounds_over_rates, canvas, legend, over_rates
from benchmarks.figures.figure import Document, Figure, document
from benchmarks.figures.lab import Lab
from benchmarks.figures.qps_scaling import AUTHORS_BUDGET
from benchmarks.figures.records import Record, compared, mean, name_of, of, policies, rates, table, times
from lab.simulate.experiment import Experiment, Run

NAME = "other_profiles"
POLICIES = ("fcfs", "s3", "mooncake", "scorpio")
CAUTIOUS = "scorpio:eta=1.6"
"""Added where prefills stop all decodes: eta is what SCORPIO has to allow for that."""
CLEARLY = 1.0
"""Points of adherence that are worth a word."""
SEEDS = (0, 1)
DURATION_S = 60.0


@dataclass(frozen=True, slots=True)
class Panel:
    """A profile in a step mode, and the rates from calm to collapse."""

    profile: str
    step_mode: str
    rates: tuple[float, ...]
    policies: tuple[str, ...] = POLICIES

    def experiment(self, duration_s: float) -> Experiment:
        """As deployed: chunked with the profile's own budget, prefill-first with the authors'."""
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
    """Every panel: policies, rates, seeds."""
    seeds = (0,) if quick else SEEDS
    tasks = [
        (panel.experiment(1.0 if quick else DURATION_S), Run(policy, float(qps), seed))
        for panel in PANELS
        for policy in panel.policies
        for qps in (panel.rates[:1] if quick else panel.rates)
        for seed in seeds
    ]
    profiles = tuple(dict.fromkeys(panel.profile for panel in PANELS))
    return document(NAME, seeds, profiles, runs=lab.runs("Other profiles", tasks))


def _of(panel: Panel, runs: list[Record]) -> list[Record]:
    return of(runs, profile=panel.profile, step_mode=panel.step_mode)


def draw(made: Document, folder: Path) -> list[str]:
    """A column a panel: goodput above, adherence below."""
    with canvas(folder / f"{NAME}.png", "ShareGPT lengths, the paper's SLOs", 2, len(PANELS), (17, 6.6)) as (
        figure,
        axes,
    ):
        for column, panel in enumerate(PANELS):
            own = _of(panel, made["runs"])
            goodput, adherence = axes[0][column], axes[1][column]
            over_rates(goodput, own, "goodput")
            over_rates(adherence, own, "slo_adherence")
            bounds_over_rates(adherence, own)
            goodput.set_title(f"{panel.profile}, {panel.step_mode}")
            goodput.set_xlabel("")
        axes[0][0].set_ylabel("goodput, attained/s")
        axes[1][0].set_ylabel("SLO adherence")
        legend(figure, [*axes[0], *axes[1]])
    return [f"{NAME}.png"]


def section(made: Document) -> str:
    """One table a panel, and what stands out."""
    parts = [
        f"""**The paper** has one engine. **Here** the same policies run on three accounts of the same card, which
disagree by
2x and more ([profiles](../profiles.md)), under today's vLLM (chunked prefill, budget 2048) and under vLLM 0.6's rule
(prefill-first, budget 1024). {DURATION_S:g} s of Poisson arrivals, {len(made["seeds"])} seeds, as it came out.

![Goodput and adherence on five engines]({NAME}.png)

Adherence, mean over the seeds; the last column compares goodput and adherence of `scorpio` with stock vLLM's."""
    ]
    for panel in PANELS:
        own = _of(panel, made["runs"])
        names = policies(own)
        rows = []
        for qps in rates(own):
            at = of(own, qps=qps)
            factor, points = compared(at, "scorpio", "fcfs")
            cells = [f"{mean(of(at, policy=p), 'slo_adherence'):.2f}" for p in names]
            bounds = f"{mean(at, 'count_bound'):.2f} / {mean(at, 'fair_bound'):.2f}"
            rows.append([f"{qps:g}", *cells, bounds, f"{times(factor)}, {points:+.1f} points"])
        heads = ["offered/s", *map(name_of, names), "count / fair bound", "`scorpio` over stock"]
        parts.append(f"`{panel.profile}`, {panel.step_mode}:\n\n{table(heads, rows)}")
    parts.append(_reading(made["runs"]))
    return "\n\n".join(parts) + "\n"


def _reading(runs: list[Record]) -> str:
    rows = []
    for panel in PANELS:
        own = _of(panel, runs)
        for qps in rates(own):
            at = of(own, qps=qps)
            adherence = {policy: mean(of(at, policy=policy), "slo_adherence") for policy in POLICIES}
            best = max(adherence, key=lambda policy: adherence[policy])
            behind = 100 * (adherence[best] - adherence["scorpio"])
            if behind > CLEARLY:
                late, refused = (
                    f"{mean(of(at, policy='scorpio'), key):.0%}" for key in ("tpot_violations", "rejected")
                )
                engine = f"`{panel.profile}`, {panel.step_mode}"
                rows.append([engine, f"{qps:g}", f"`{best}` by {behind:.0f} points", late, refused])
    if not rows:
        return f"**Where SCORPIO fails.** Nowhere is another policy more than {CLEARLY:g} point ahead of `scorpio`."
    heads = ["engine", "offered/s", "best baseline, ahead", "`scorpio`: late tokens", "`scorpio`: rejected"]
    return f"""**Where SCORPIO fails.** Here a baseline is ahead of it by more than {CLEARLY:g} point of adherence:

{table(heads, rows)}

Where many of its tokens are late: its TPOT estimate is eta times the time of a step that only decodes, and in
prefill-first mode decodes stand still during prefills, for a share of the time that one constant (1.3) does not know.
With eta 1.6 (dashed) nearly all tokens are in time, at the price of refusals at lower rates. Its credits add to it:
they
slow a request with a loose bound to just that bound, which leaves nothing in hand for the next prefill. Where none are
late it refuses what others serve in time: eta is too cautious there, and the strictest running request decides for all.
`mooncake` falls off on the fastest engines at the highest rates, because it does not look at places in the batch
(`max_num_seqs` 256): what it lets in then waits inside the engine for one. Where steps hardly grow with context and
batch
(`blis-a100`, chunked), nobody's tokens are late, and shortest first, which rejects nobody, frees places fastest."""


def headline(made: Document) -> str:
    """The extremes over all panels."""
    points = [
        compared(of(own, qps=qps), "scorpio", "fcfs")[1]
        for own in (_of(panel, made["runs"]) for panel in PANELS)
        for qps in rates(own)
    ]
    return (
        f"`scorpio` {min(points):+.0f} to {max(points):+.0f} points of adherence against stock vLLM, by engine and rate"
    )


FIGURE = Figure(NAME, "The same on other step times and step modes", measure, draw, section, headline)
