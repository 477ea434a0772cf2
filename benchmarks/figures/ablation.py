"""SCORPIO, figure 6: each guard alone, both guards, and neither."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.drawing import canvas, look
from benchmarks.figures.figure import Document, Figure, new_document
from benchmarks.figures.lab import Lab
from benchmarks.figures.qps_scaling import AUTHORS_BUDGET, PROFILE
from benchmarks.figures.records import Record, factor_text, matching, mean, policies_of, rates_of, ratio
from benchmarks.markdown import policy_label, table
from lab.simulate.experiment import Experiment, Run

NAME = "ablation"
POLICIES = ("fcfs", "ttft_guard_only", "tpot_guard_only", "scorpio")
RATES = (14.0, 20.0)
SEEDS = (0, 1, 2)
DURATION_S = 60.0
PANELS = {
    "ttft_violations": "TTFT violations",
    "tpot_violations": "TPOT violations",
    "rejected": "rejected",
    "goodput": "goodput, attained/s",
}


def measure(lab: Lab, quick: bool) -> Document:
    """Run the four policies at the paper's rate, and at a rate where TTFT bounds are missed too."""
    seeds = (0,) if quick else SEEDS
    workload = {"name": "sharegpt", "duration_s": 0.5 if quick else DURATION_S}
    experiment = Experiment(PROFILE, workload, step_mode="prefill-first", limits=dict(AUTHORS_BUDGET))
    tasks = [(experiment, Run(policy, qps, seed)) for qps in RATES for policy in POLICIES for seed in seeds]
    return new_document(NAME, seeds, (PROFILE,), runs=lab.runs("Figure 6", tasks))


def draw(document: Document, folder: Path) -> list[str]:
    """Draw bars: one panel per quantity, one group per rate."""
    names = policies_of(document["runs"])
    with canvas(folder / f"{NAME}.png", f"SCORPIO figure 6 on {PROFILE}, prefill-first", 1, 4, (12, 3.6)) as (
        figure,
        (cells,),
    ):
        for axes, (key, title) in zip(cells, PANELS.items(), strict=True):
            for position, policy in enumerate(names):
                by_rate = [matching(document["runs"], policy=policy, qps=qps) for qps in RATES]
                heights = [mean(records, key) for records in by_rate]
                x = [group + (position - (len(names) - 1) / 2) * 0.2 for group in range(len(RATES))]
                spread = [
                    [abs(h - pick(r[key] for r in records)) for h, records in zip(heights, by_rate, strict=True)]
                    for pick in (min, max)
                ]
                label = "fcfs (neither guard)" if policy == "fcfs" else policy
                axes.bar(x, heights, 0.18, color=look(policy)[0], yerr=spread, error_kw={"linewidth": 1}, label=label)
            axes.set_title(title)
            axes.set_xticks(range(len(RATES)), [f"{qps:g}/s" for qps in RATES])
            axes.grid(axis="x", visible=False)
            if key != "goodput":
                axes.set_ylim(0, 1)
        cells[0].set_ylabel("share of all requests")
        figure.legend(*cells[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return [f"{NAME}.png"]


def section(document: Document) -> str:
    """The table, and the effect of each guard alone."""
    runs = document["runs"]
    rows = [
        [
            f"{qps:g}",
            policy_label(policy),
            *(f"{mean(matching(runs, qps=qps, policy=policy), key):.2f}" for key in [*PANELS, "slo_adherence"]),
        ]
        for qps in rates_of(runs)
        for policy in policies_of(runs)
    ]
    return f"""**Paper.** At 14 requests/s, goodput is far lower with neither guard. The TTFT guard alone removes TTFT
violations but leaves severe TPOT violations. The TPOT guard alone does the reverse.

**Here.** As in figure 4: `{PROFILE}`, prefill-first, {runs[0]["workload_options"]["duration_s"]:g} s of arrivals,
{len(document["seeds"])} seeds. Violations are shares of all requests. A rejected request violates no bound, and is not
attained.

![Violations and goodput of each guard]({NAME}.png)

{table(["offered/s", "policy", *PANELS.values(), "adherence"], rows)}

**Comparison.** {_reading_at(runs, RATES[0])}

{_reading_at(runs, RATES[1])}

So the guards depend on each other: the TPOT guard needs a guard that rejects, and rejection by TTFT alone does not
protect TPOT. They do not matter equally. On this engine TPOT fails first, and the TTFT guard alone matters only once
the batch is full.
"""


def _reading_at(runs: list[Record], qps: float) -> str:
    def value(policy: str, key: str) -> float:
        return mean(matching(runs, qps=qps, policy=policy), key)

    stock_late = value("fcfs", "ttft_violations")
    if stock_late < 0.01:
        first = (
            f"At {qps:g}/s stock vLLM runs prefills first and misses hardly any TTFT bound ({stock_late:.1%}), "
            f"so the TTFT guard alone changes nothing. Goodput is {value('ttft_guard_only', 'goodput'):.2f}/s against "
            f"{value('fcfs', 'goodput'):.2f}/s; TPOT violations are "
            f"{value('ttft_guard_only', 'tpot_violations'):.0%} against {value('fcfs', 'tpot_violations'):.0%}."
        )
    else:
        first = (
            f"At {qps:g}/s the batch is full, and stock vLLM violates {stock_late:.0%} of TTFT bounds. The TTFT guard "
            f"alone reduces that to {value('ttft_guard_only', 'ttft_violations'):.0%}, and leaves "
            f"{value('ttft_guard_only', 'tpot_violations'):.0%} TPOT violations."
        )
    best_alone = max(value("ttft_guard_only", "goodput"), value("tpot_guard_only", "goodput"))
    return (
        f"{first} The TPOT guard alone reduces TPOT violations from {value('fcfs', 'tpot_violations'):.0%} to "
        f"{value('tpot_guard_only', 'tpot_violations'):.1%}. It rejects nothing, so the requests that it delays cause "
        f"{value('tpot_guard_only', 'ttft_violations'):.0%} TTFT violations. With both guards "
        f"{value('scorpio', 'ttft_violations'):.1%} violate TTFT and {value('scorpio', 'tpot_violations'):.1%} TPOT; "
        f"goodput is {factor_text(ratio(value('scorpio', 'goodput'), best_alone))} that of the better guard alone."
    )


def headline(document: Document) -> str:
    """Goodput of the four policies at the paper's rate."""
    goodput = [
        f"{policy_label(p)} {mean(matching(document['runs'], qps=RATES[0], policy=p), 'goodput'):.2f}" for p in POLICIES
    ]
    return f"goodput at {RATES[0]:g}/s: {', '.join(goodput)}"


FIGURE = Figure(NAME, "Each guard alone (SCORPIO, figure 6)", measure, draw, section, headline)
