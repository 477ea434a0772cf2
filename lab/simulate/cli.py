"""`antares simulate`: policies in virtual time on the step times of a profile, without a GPU."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from lab.workload_options import (
    Arrivals,
    Burstiness,
    Duration,
    MaxOutput,
    MaxPrompt,
    Mix,
    Requests,
    SloScale,
    SloTable,
    Speed,
    Trace,
    Window,
    Workload,
    workload_arguments,
)

if TYPE_CHECKING:
    from lab.simulate.experiment import Experiment, Run

console = Console(stderr=True, highlight=False)

_WALL_CLOCK = ("scheduling_s", "wall_s", "setup_s")


def simulate(
    context: typer.Context,
    profile: Annotated[
        str, typer.Option(help="Whose step times: a shipped profile, or a profile's .json file.")
    ] = "a100-llama3.1-8b",
    workload: Workload = "sharegpt",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME:OPTION=VALUE,...; repeat for several. [default: fcfs, scorpio]"),
    ] = None,
    qps: Annotated[
        list[float] | None, typer.Option(help="Offered requests per second; repeat for several. [default: 20]")
    ] = None,
    hold: Annotated[
        float | None,
        typer.Option(help="Instead of --qps: find the highest rate that keeps this adherence, such as 0.9."),
    ] = None,
    step_mode: Annotated[
        str, typer.Option(help="chunked (vLLM today) or prefill-first (vLLM 0.6, whole prompts).")
    ] = "chunked",
    requests: Requests = None,
    duration: Duration = None,
    arrivals: Arrivals = "poisson",
    burstiness: Burstiness = 1.0,
    trace: Trace = None,
    speed: Speed = 1.0,
    window: Window = None,
    slo_table: SloTable = "llama-3.1-8b",
    slo_scale: SloScale = 1.0,
    mix: Mix = None,
    max_prompt: MaxPrompt = None,
    max_output: MaxOutput = None,
    predictor: Annotated[
        str,
        typer.Option(help="Lengths as told to the gateway: shipped[:FACTOR], oracle, noise:SIGMA, constant, reversed."),
    ] = "shipped",
    replicas: Annotated[int, typer.Option(min=1, help="Engines behind the gateway.")] = 1,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="vLLM's. [default: the profile's]")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="vLLM's. [default: the profile's]")] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="KV memory (tokens). [default: the profile's]")] = None,
    learn: Annotated[
        bool, typer.Option("--learn/--no-learn", help="Policies learn step times from the run, as they do live.")
    ] = True,
    apart: Annotated[
        bool,
        typer.Option("--apart/--inside", help="The gateway reacts to a step when the next has begun, or at once."),
    ] = True,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat for several. [default: 0]")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core. 1 times runs best.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    timings: Annotated[
        bool, typer.Option("--timings/--no-timings", help="Keep wall-clock times: all that differs between two runs.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="Write goodput and adherence over the rate as a PNG.")] = None,
) -> None:
    """Plan capacity and compare policies without a GPU, a thousand times faster than real time.

    How many requests per second can one A100 hold at the paper's SLOs, 90% of them attained?

        antares simulate --hold 0.9

    What would SCORPIO make of twice the load that stock vLLM survives?

        antares simulate --qps 20 --qps 40 --policy fcfs --policy scorpio --plot curve.png
    """
    from lab.simulate.experiment import Experiment, runs_of

    seeds, policies = list(dict.fromkeys(seed or [0])), list(dict.fromkeys(policy or ["fcfs", "scorpio"]))
    rates: list[float | None] = [*qps] if qps else [None if arrivals == "trace" else 20.0]
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "kv_tokens": kv_tokens}
    try:
        asked = {"name": workload, **workload_arguments(context.params, unless_told_s=60.0)}
        experiment = Experiment(
            profile=profile,
            workload=asked,
            predictor=predictor,
            step_mode=step_mode,
            replicas=replicas,
            learn=learn,
            apart=apart,
            limits={name: limit for name, limit in limits.items() if limit is not None},
        )
        if hold is not None:
            _check_hold(experiment, hold, qps)
            rates = [1.0]
        _check(experiment, policies, rates, seeds, plot)
    except ValueError as error:
        _usage(str(error))
    except ModuleNotFoundError as error:
        _fail(error)
    workers = jobs or os.cpu_count() or 1
    document: dict[str, Any] = {"runs": []}
    try:
        if hold is None:
            document["runs"] = _perform(experiment, runs_of(policies, rates, seeds), workers)
        else:
            document["capacity_qps"] = {}
            for one in policies:
                rate, records = _capacity(experiment, one, seeds, hold, workers)
                document["capacity_qps"][one] = round(rate, 2)
                document["runs"] += records
    except ValueError as error:
        _usage(str(error))
    if plot is not None:
        _plot(document["runs"], plot, f"{profile}, {workload}")
    if not timings:
        for record in document["runs"]:
            record.update(dict.fromkeys(_WALL_CLOCK))
    if as_json:
        json.dump(document, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print(document, experiment, hold)


def _check_hold(experiment: Experiment, hold: float, qps: list[float] | None) -> None:
    """Refuse what `--hold` cannot go with. Raises ValueError."""
    if not 0 < hold <= 1:
        raise ValueError("--hold is a share of all requests, above 0 and at most 1")
    if qps:
        raise ValueError("--hold looks for the rate itself: leave --qps out")
    if experiment.workload["arrivals"] == "trace":
        raise ValueError("--hold needs arrivals whose rate can be chosen: poisson or gamma")
    if experiment.workload["requests"] is not None:
        raise ValueError("--hold needs arrivals that go on: give --duration instead of --requests")


def _check(
    experiment: Experiment, policies: list[str], rates: list[float | None], seeds: list[int], plot: Path | None
) -> None:
    """Refuse at once what cannot run. Raises ValueError, or ModuleNotFoundError for a missing package."""
    from engine_adapter.simulated.scheduler import STEP_MODES
    from lab.records.plot import check_plot
    from lab.simulate.experiment import parse_policy
    from lab.simulate.predictions import predict
    from lab.workload import make_workload

    experiment.engine()
    if experiment.step_mode not in STEP_MODES:
        raise ValueError(f"unknown step mode {experiment.step_mode!r}: choose one of {', '.join(STEP_MODES)}")
    for policy in policies:
        parse_policy(policy)
    if any(seed < 0 for seed in seeds):
        raise ValueError("--seed must be at least 0")
    if plot is not None:
        check_plot(plot)
    small = {**experiment.workload, "requests": 1}
    for rate in rates:
        predict(experiment.predictor, make_workload(qps=rate, seed=seeds[0], **small), 0)


def _perform(experiment: Experiment, runs: list[Run], jobs: int) -> list[dict[str, Any]]:
    from lab.simulate.experiment import perform_all

    records = []
    with _progress("Simulating", len(runs)) as advance:
        for record in perform_all(experiment, runs, jobs):
            records.append(record)
            advance(f"{record['policy']} at {record['qps']:g}/s")
    return records


def _capacity(
    experiment: Experiment, policy: str, seeds: list[int], hold: float, jobs: int
) -> tuple[float, list[dict[str, Any]]]:
    from lab.simulate.experiment import capacity

    with _progress(f"Looking for the rate that {policy} holds", None) as advance:
        return capacity(
            experiment,
            policy,
            seeds,
            hold,
            jobs=jobs,
            on_try=lambda qps, got: advance(f"{policy} at {qps:.1f}/s: adherence {got:.3f}"),
        )


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


def _plot(runs: list[dict[str, Any]], path: Path, title: str) -> None:
    from lab.records.plot import plot_runs

    try:
        plot_runs(runs, path, title)
    except OSError as error:
        _fail(error)
    console.print(f"Wrote {path}")


def _print(document: dict[str, Any], experiment: Experiment, hold: float | None) -> None:
    from lab.simulate.experiment import MOST_QPS

    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=160)  # piped: nothing to fit into
    if hold is not None:
        for policy, rate in document["capacity_qps"].items():
            most = "at least " if rate >= MOST_QPS else ""
            out.print(
                f"{policy}: {most}{rate:g} requests/s with {hold:.0%} of them attained "
                f"({experiment.profile}, {experiment.workload['name']})"
            )
        return
    runs = document["runs"]
    table = Table(title=f"{experiment.profile}, {experiment.workload['name']}, {experiment.step_mode} steps")
    heads = ("policy", "offered /s", "goodput /s", "adherence", "rejected", "late TTFT", "late TPOT", "TTFT p50 s",
             "TPOT p50 s", "count bound", "fair bound")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "policy" else "right")
    for policy, rate in dict.fromkeys((run["policy"], run["qps"]) for run in runs):
        same = [run for run in runs if (run["policy"], run["qps"]) == (policy, rate)]
        keys = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations", "ttft_p50_s",
                "tpot_p50_s", "count_bound", "fair_bound")  # fmt: skip
        table.add_row(policy, f"{rate:g}", *(_mean([run[key] for run in same]) for key in keys))
    out.print(table)
    if len({run["seed"] for run in runs}) > 1:
        out.print("Means over seeds; --json has each run.")


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"


def _usage(text: str) -> NoReturn:
    console.print(f"antares simulate: {text}", markup=False)
    raise typer.Exit(2)


def _fail(error: Exception) -> NoReturn:
    console.print(f"antares simulate: {error}", markup=False)
    raise typer.Exit(1) from error
