"""Effect of length prediction: the shipped predictor's errors, an oracle, and a constant."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from benchmarks.figures.drawing import canvas, look
from benchmarks.figures.figure import Document, Figure, new_document
from benchmarks.figures.lab import Lab, experiment_fields, shortened
from benchmarks.figures.records import Record, matching, mean
from benchmarks.figures.replay import simulate_run
from benchmarks.markdown import table
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
    """Find the capacity of stock vLLM, then run at one and two times that rate with each predictor."""
    duration_s, seeds = (0.5, (0,)) if quick else (DURATION_S, SEEDS)
    saturation = 20.0 if quick else lab.each("Stock vLLM's capacity", _saturation, [duration_s])[0]
    tasks = [
        (_experiment(duration_s, predictor), Run(policy, round(load * saturation, 3), seed))
        for policy in POLICIES
        for load in LOADS
        for predictor in PREDICTORS
        for seed in seeds
    ]
    runs = lab.each("Predictors", _record_of, tasks)
    for (_, run), record in zip(tasks, runs, strict=True):
        record["load"] = min(LOADS, key=lambda load: abs(load * saturation - (run.qps or 0.0)))
    return new_document(NAME, seeds, (PROFILE,), saturation_qps=round(saturation, 3), hold=HOLD, runs=runs)


def _experiment(duration_s: float, predictor: str) -> Experiment:
    return Experiment(PROFILE, {"name": "sharegpt", "duration_s": duration_s}, predictor=predictor)


def _record_of(task: tuple[Experiment, Run]) -> Record:
    """The record of one run, with the mean output length (tokens) of all requests and of the attained ones."""
    experiment, run = task
    workload, result = simulate_run(experiment, run)
    record = run_record(run.policy, run.qps or 0.0, run.seed, result.results, result.duration_s, wall_s=0.0)
    attained = [one.request.output_tokens for one in result.results if one.attained]
    return (
        experiment_fields(experiment)
        | shortened(record)
        | {"mean_output_tokens": round(fmean(one.output_tokens for one in workload), 1)}
        | {"mean_output_tokens_attained": round(fmean(attained), 1) if attained else 0.0}
    )


def _saturation(duration_s: float) -> float:
    return capacity(_experiment(duration_s, "shipped"), "fcfs", [0], HOLD)[0]


def draw(document: Document, folder: Path) -> list[str]:
    """Draw bars: one panel per policy, one group per load."""
    with canvas(folder / f"{NAME}.png", f"goodput by length predictor on {PROFILE}, chunked", 1, 2, (9, 3.6)) as (
        _,
        (cells,),
    ):
        for axes, policy in zip(cells, POLICIES, strict=True):
            colour = look(policy)[0]
            for position, predictor in enumerate(PREDICTORS):
                by_load = [matching(document["runs"], policy=policy, predictor=predictor, load=load) for load in LOADS]
                heights = [mean(records, "goodput") for records in by_load]
                spread = [
                    [abs(h - pick(r["goodput"] for r in records)) for h, records in zip(heights, by_load, strict=True)]
                    for pick in (min, max)
                ]
                x = [group + (position - 1) * 0.26 for group in range(len(LOADS))]
                bars = axes.bar(
                    x, heights, 0.24, color=colour, alpha=1 - 0.32 * position, yerr=spread, error_kw={"linewidth": 1}
                )
                axes.bar_label(bars, labels=[predictor] * len(LOADS), fontsize=8, padding=3)
            axes.set_title(policy)
            axes.set_xticks(range(len(LOADS)), [f"{load:g} x saturation" for load in LOADS])
            axes.grid(axis="x", visible=False)
            axes.margins(y=0.12)
        cells[0].set_ylabel("goodput, attained/s")
    return [f"{NAME}.png"]


def section(document: Document) -> str:
    """The settings, the table, and the gains over a constant."""
    runs = document["runs"]
    rows = []
    for policy in POLICIES:
        for load in LOADS:
            cells = []
            for predictor in PREDICTORS:
                own = matching(runs, policy=policy, load=load, predictor=predictor)
                cells.append(f"{mean(own, 'goodput'):.2f} / {mean(own, 'slo_adherence'):.3f}")
            rows.append([f"`{policy}`", f"{load:g}x: {matching(runs, load=load)[0]['qps']:.1f}/s", *cells])
    return f"""**Paper.** Evaluates the predictor by itself, not the cost of its errors.

**Here.** `{PROFILE}`, chunked prefill, {runs[0]["workload_options"]["duration_s"]:g} s of ShareGPT arrivals,
{len(document["seeds"])} seeds. Load 1 is the capacity of stock vLLM: it
attains {document["hold"]:.0%} at {document["saturation_qps"]:.1f}/s with seed 0.

- `oracle`: the true length.
- `shipped`: the errors of the shipped model on held-out answers.
- `constant`: the median of the workload for every request.

![Goodput by predictor]({NAME}.png)

Goodput in attained requests/s / adherence:

{table(["policy", "load", *(f"`{p}`" for p in PREDICTORS)], rows)}

{_reading(runs)}
"""


def _gain(runs: list[Record], policy: str, load: float, predictor: str) -> float:
    """Relative change of goodput against the constant prediction."""

    def goodput(name: str) -> float:
        return mean(matching(runs, policy=policy, load=load, predictor=name), "goodput")

    return goodput(predictor) / goodput("constant") - 1 if goodput("constant") else 0.0


def _reading(runs: list[Record]) -> str:
    def gains(policy: str, load: float) -> str:
        return " and ".join(f"{_gain(runs, policy, load, p):+.0%} with `{p}`" for p in PREDICTORS[:-1])

    def attained_length(predictor: str) -> str:
        own = matching(runs, policy="scorpio", load=LOADS[-1], predictor=predictor)
        return f"{mean(own, 'mean_output_tokens_attained'):.0f} tokens with `{predictor}`"

    all_lengths = mean(matching(runs, load=LOADS[-1]), "mean_output_tokens")
    return (
        f"Goodput of `scorpio` against `constant` at load 1: {gains('scorpio', LOADS[0])}. At load "
        f"{LOADS[-1]:g}: {gains('scorpio', LOADS[-1])}. `s3` at load {LOADS[-1]:g}: {gains('s3', LOADS[-1])}."
        "\n\n"
        "`s3` orders requests by predicted length. `scorpio` does not. But when the batch is nearly full, its TPOT "
        "estimate still admits short answers, which add less context. A request that does not fit does not block the "
        "requests behind it. So with better predictions `scorpio` prefers cheap requests. The mean length of attained "
        f"answers is {', '.join(attained_length(p) for p in PREDICTORS)}. Over all answers it is {all_lengths:.0f} "
        "tokens."
    )


def headline(document: Document) -> str:
    """The gain of an oracle at overload."""
    gains = [f"`{p}` {_gain(document['runs'], p, LOADS[-1], 'oracle'):+.1%}" for p in POLICIES]
    return f"goodput with an oracle over a constant at load 2: {', '.join(gains)}"


FIGURE = Figure(NAME, "Effect of length prediction", measure, draw, section, headline)
