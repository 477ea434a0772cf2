"""What accuracy of predicted lengths buys: the shipped predictor's errors, an oracle, and no information at all."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from benchmarks.figures.drawing import canvas, look
from benchmarks.figures.figure import Document, Figure, document
from benchmarks.figures.lab import DROPPED, Lab, described
from benchmarks.figures.records import Record, mean, of, table
from benchmarks.figures.replay import played
from lab.records.run_record import run_record
from lab.simulate.experiment import Experiment, Run, capacity

NAME = "prediction"
POLICIES = ("scorpio", "s3")
PREDICTORS = ("oracle", "shipped", "constant")
PROFILE = "a100-llama3.1-8b"
SEEDS = (0, 1, 2)
DURATION_S = 60.0
HOLD = 0.9
LOADS = (1.0, 2.0)


def measure(lab: Lab, quick: bool) -> Document:
    """Find what stock vLLM holds, then run at one and two times that with each predictor."""
    duration_s, seeds = (1.0, (0,)) if quick else (DURATION_S, SEEDS)
    saturation = 20.0 if quick else lab.each("Stock vLLM's saturation", _saturation, [duration_s])[0]
    tasks = [
        (_experiment(duration_s, predictor), Run(policy, round(load * saturation, 3), seed))
        for policy in POLICIES
        for load in LOADS
        for predictor in PREDICTORS
        for seed in seeds
    ]
    runs = lab.each("Predictors", _run, tasks)
    for (_, run), record in zip(tasks, runs, strict=True):
        record["load"] = min(LOADS, key=lambda load: abs(load * saturation - (run.qps or 0.0)))
    return document(NAME, seeds, (PROFILE,), saturation_qps=round(saturation, 3), hold=HOLD, runs=runs)


def _experiment(duration_s: float, predictor: str) -> Experiment:
    return Experiment(PROFILE, {"name": "sharegpt", "duration_s": duration_s}, predictor=predictor)


def _run(task: tuple[Experiment, Run]) -> Record:
    """The record of one run, with the mean output length of all requests and of those that attained (tokens)."""
    experiment, run = task
    asked, came = played(experiment, run)
    record = run_record(run.policy, run.qps or 0.0, run.seed, came.results, came.duration_s, wall_s=0.0)
    attained = [one.request.output_tokens for one in came.results if one.attained]
    return (
        described(experiment)
        | {key: value for key, value in record.items() if key not in DROPPED}
        | {"mean_output_tokens": round(fmean(one.output_tokens for one in asked), 1)}
        | {"mean_output_tokens_attained": round(fmean(attained), 1) if attained else 0.0}
    )


def _saturation(duration_s: float) -> float:
    return capacity(_experiment(duration_s, "shipped"), "fcfs", [0], HOLD)[0]


def draw(made: Document, folder: Path) -> list[str]:
    """Bars: a panel a policy, a group a load."""
    with canvas(folder / f"{NAME}.png", f"what accuracy buys on {PROFILE}, chunked", 1, 2, (9, 3.6)) as (
        _,
        (cells,),
    ):
        for axes, policy in zip(cells, POLICIES, strict=True):
            colour = look(policy)[0]
            for place, predictor in enumerate(PREDICTORS):
                at = [of(made["runs"], policy=policy, predictor=predictor, load=load) for load in LOADS]
                heights = [mean(records, "goodput") for records in at]
                spread = [
                    [abs(h - pick(r["goodput"] for r in records)) for h, records in zip(heights, at, strict=True)]
                    for pick in (min, max)
                ]
                x = [group + (place - 1) * 0.26 for group in range(len(LOADS))]
                bars = axes.bar(
                    x, heights, 0.24, color=colour, alpha=1 - 0.32 * place, yerr=spread, error_kw={"linewidth": 1}
                )
                axes.bar_label(bars, labels=[predictor] * len(LOADS), fontsize=8, padding=3)
            axes.set_title(policy)
            axes.set_xticks(range(len(LOADS)), [f"{load:g} x saturation" for load in LOADS])
            axes.grid(axis="x", visible=False)
            axes.margins(y=0.12)
        cells[0].set_ylabel("goodput, attained/s")
    return [f"{NAME}.png"]


def section(made: Document) -> str:
    """The table and what it says."""
    runs = made["runs"]
    rows = []
    for policy in POLICIES:
        for load in LOADS:
            cells = []
            for predictor in PREDICTORS:
                at = of(runs, policy=policy, load=load, predictor=predictor)
                cells.append(f"{mean(at, 'goodput'):.2f} / {mean(at, 'slo_adherence'):.3f}")
            rows.append([f"`{policy}`", f"{load:g}x: {of(runs, load=load)[0]['qps']:.1f}/s", *cells])
    return f"""**The paper** studies its predictor by itself, not what its errors cost. **Here** `{PROFILE}`,
chunked, {runs[0]["asked"]["duration_s"]:g} s of
ShareGPT arrivals, {len(made["seeds"])} seeds, at one and two times the rate of which stock vLLM attains
{made["hold"]:.0%} ({made["saturation_qps"]:.1f}/s). `shipped`: the
errors of our shipped model on held-out answers. `constant`: the workload's median for everybody. `oracle`: the true
length.

![Goodput by predictor]({NAME}.png)

Goodput in attained requests/s, then adherence:

{table(["policy", "load", *(f"`{p}`" for p in PREDICTORS)], rows)}

{_reading(runs)}
"""


def _gain(runs: list[Record], policy: str, load: float, predictor: str) -> float:
    def got(which: str) -> float:
        return mean(of(runs, policy=policy, load=load, predictor=which), "goodput")

    return got(predictor) / got("constant") - 1 if got("constant") else 0.0


def _reading(runs: list[Record]) -> str:
    def gains(policy: str, load: float) -> str:
        return " and ".join(f"{_gain(runs, policy, load, p):+.0%} from `{p}`" for p in PREDICTORS[:-1])

    def attained(predictor: str) -> str:
        at = of(runs, policy="scorpio", load=LOADS[-1], predictor=predictor)
        return f"{mean(at, 'mean_output_tokens_attained'):.0f} with `{predictor}`"

    everybody = mean(of(runs, load=LOADS[-1]), "mean_output_tokens")
    return (
        f"Over a constant, at saturation `scorpio`'s goodput changes by {gains('scorpio', LOADS[0])}; at "
        f"{LOADS[-1]:g} times "
        f"saturation by {gains('scorpio', LOADS[-1])}, and `s3`'s by {gains('s3', LOADS[-1])}. "
        "`s3` orders by predicted length. `scorpio` does not, but when the batch is nearly full its TPOT estimate "
        "still lets "
        "short answers in (they add less context), and a request that does not fit never blocks the one behind it. "
        "So a "
        "better prediction makes it prefer cheap requests: the answers of those that attained have on average "
        f"{', '.join(attained(p) for p in PREDICTORS)} tokens, all answers {everybody:.0f}."
    )


def headline(made: Document) -> str:
    """What an oracle buys at overload."""
    got = [f"`{p}` {_gain(made['runs'], p, LOADS[-1], 'oracle'):+.1%}" for p in POLICIES]
    return f"goodput with an oracle over a constant at twice saturation: {', '.join(got)}"


FIGURE = Figure(NAME, "What accuracy of predicted lengths buys", measure, draw, section, headline)
