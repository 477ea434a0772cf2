"""SCORPIO, figure 6: each guard alone, both, and neither."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.drawing import canvas, look
from benchmarks.figures.figure import Document, Figure, document
from benchmarks.figures.lab import Lab
from benchmarks.figures.qps_scaling import AUTHORS_BUDGET, PROFILE
from benchmarks.figures.records import Record, mean, name_of, of, policies, rates, ratio, table, times
from lab.simulate.experiment import Experiment, Run

NAME = "ablation"
POLICIES = ("fcfs", "ttft_guard_only", "tpot_guard_only", "scorpio")
RATES = (14.0, 20.0)
SEEDS = (0, 1, 2)
DURATION_S = 60.0
SHOWN = {
    "ttft_violations": "late first token",
    "tpot_violations": "late tokens",
    "rejected": "rejected",
    "goodput": "goodput, attained/s",
}


def measure(lab: Lab, quick: bool) -> Document:
    """The four policies at the paper's rate, and at one where first tokens are late too."""
    seeds = (0,) if quick else SEEDS
    workload = {"name": "sharegpt", "duration_s": 1.0 if quick else DURATION_S}
    experiment = Experiment(PROFILE, workload, step_mode="prefill-first", limits=dict(AUTHORS_BUDGET))
    tasks = [(experiment, Run(policy, qps, seed)) for qps in RATES for policy in POLICIES for seed in seeds]
    return document(NAME, seeds, (PROFILE,), runs=lab.runs("Figure 6", tasks))


def draw(made: Document, folder: Path) -> list[str]:
    """Bars: a panel a quantity, a group a rate."""
    names = policies(made["runs"])
    with canvas(folder / f"{NAME}.png", f"SCORPIO figure 6 on {PROFILE}, prefill-first", 1, 4, (12, 3.6)) as (
        figure,
        (cells,),
    ):
        for axes, (key, label) in zip(cells, SHOWN.items(), strict=True):
            for place, policy in enumerate(names):
                at = [of(made["runs"], policy=policy, qps=qps) for qps in RATES]
                heights = [mean(records, key) for records in at]
                x = [group + (place - (len(names) - 1) / 2) * 0.2 for group in range(len(RATES))]
                spread = [
                    [abs(h - pick(r[key] for r in records)) for h, records in zip(heights, at, strict=True)]
                    for pick in (min, max)
                ]
                label_of = "fcfs (neither guard)" if policy == "fcfs" else policy
                axes.bar(
                    x, heights, 0.18, color=look(policy)[0], yerr=spread, error_kw={"linewidth": 1}, label=label_of
                )
            axes.set_title(label)
            axes.set_xticks(range(len(RATES)), [f"{qps:g}/s" for qps in RATES])
            axes.grid(axis="x", visible=False)
            if key != "goodput":
                axes.set_ylim(0, 1)
        cells[0].set_ylabel("share of all requests")
        figure.legend(*cells[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return [f"{NAME}.png"]


def section(made: Document) -> str:
    """The table, and what each guard does alone."""
    runs = made["runs"]
    rows = [
        [
            f"{qps:g}",
            name_of(policy),
            *(f"{mean(of(runs, qps=qps, policy=policy), key):.2f}" for key in [*SHOWN, "slo_adherence"]),
        ]
        for qps in rates(runs)
        for policy in policies(runs)
    ]
    return f"""**The paper.** At 14 requests/s: with neither guard goodput is far lower; the TTFT guard alone removes
TTFT violations but leaves
severe TPOT violations, and the other way round.

**Here.** As in figure 4: `{PROFILE}`, prefill-first, {made["runs"][0]["asked"]["duration_s"]:g} s of arrivals,
{len(made["seeds"])} seeds. Violations are shares of
all requests; a rejected one violates nothing and attains nothing.

![Violations and goodput of each guard]({NAME}.png)

{table(["offered/s", "policy", *SHOWN.values(), "adherence"], rows)}

**Where they differ, and why.** {_at(runs, RATES[0])}

{_at(runs, RATES[1])}

So the interdependence is there: admission control needs somebody who rejects, and rejection by first tokens alone does
nothing for the pace. The two are not equals, though: on this engine the pace breaks first, and the TTFT guard by itself
begins to matter only once the batch is full.
"""


def _at(runs: list[Record], qps: float) -> str:
    def got(policy: str, key: str) -> float:
        return mean(of(runs, qps=qps, policy=policy), key)

    stock_late = got("fcfs", "ttft_violations")
    if stock_late < 0.01:
        first = (
            f"At {qps:g}/s stock vLLM, which puts prefills first, has hardly a late first token ({stock_late:.1%}), "
            f"so the TTFT guard "
            f"alone has nothing to do: goodput {got('ttft_guard_only', 'goodput'):.2f}/s against "
            f"{got('fcfs', 'goodput'):.2f}/s, late tokens "
            f"{got('ttft_guard_only', 'tpot_violations'):.0%} against {got('fcfs', 'tpot_violations'):.0%}."
        )
    else:
        first = (
            f"At {qps:g}/s, where its batch is full, stock vLLM is late with {stock_late:.0%} of first tokens; the "
            f"TTFT guard alone brings that "
            f"to {got('ttft_guard_only', 'ttft_violations'):.0%} and leaves "
            f"{got('ttft_guard_only', 'tpot_violations'):.0%} late on TPOT."
        )
    alone = max(got("ttft_guard_only", "goodput"), got("tpot_guard_only", "goodput"))
    return (
        f"{first} The TPOT guard alone brings late tokens from {got('fcfs', 'tpot_violations'):.0%} to "
        f"{got('tpot_guard_only', 'tpot_violations'):.1%}, but nobody turns away what it holds back: "
        f"{got('tpot_guard_only', 'ttft_violations'):.0%} late first tokens. Both together: "
        f"{got('scorpio', 'ttft_violations'):.1%} and {got('scorpio', 'tpot_violations'):.1%} late, "
        f"{times(ratio(got('scorpio', 'goodput'), alone))} the goodput of the better guard alone."
    )


def headline(made: Document) -> str:
    """Goodput of all four at the paper's rate."""
    got = [f"{name_of(p)} {mean(of(made['runs'], qps=RATES[0], policy=p), 'goodput'):.2f}" for p in POLICIES]
    return f"goodput at {RATES[0]:g}/s: {', '.join(got)}"


FIGURE = Figure(NAME, "Each guard alone (SCORPIO, figure 6)", measure, draw, section, headline)
