"""`antares simulate`: simulate policies in virtual time on the step times of a profile, without a GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lab.simulate.progress import console, progress
from lab.simulate.step_jitter import StepJitter
from lab.workload_options import (
    Arrivals,
    Burstiness,
    Duration,
    MaxOutput,
    MaxPrompt,
    Mix,
    RateScale,
    Requests,
    SloScale,
    SloTable,
    Speed,
    Trace,
    TraceBlockTokens,
    TraceModel,
    TraceUnit,
    Window,
    Workload,
    workload_arguments,
    workload_name,
)

if TYPE_CHECKING:
    from lab.simulate.experiment import Experiment, Run
    from lab.simulate.gateway_config import GatewaySettings

_WALL_CLOCK = ("scheduling_s", "routing_s", "wall_s", "setup_s")
"""Keys of a run record that differ between two runs of the same command."""

_FROM_PROFILE = "from the profile"

DEFAULT_POLICIES = ("fcfs", "slack")
"""Policies without `--policy`: stock vLLM, and the gateway's default. A search takes the last one only, since it takes
many runs."""


def simulate(
    context: typer.Context,
    profile: Annotated[
        str, typer.Option(help="Step-time profile of the engine: a shipped name or a .json file.")
    ] = "a100-llama3.1-8b",
    workload: Workload = "sharegpt",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME:OPTION=VALUE,...; repeatable.",
            show_default="fcfs (stock vLLM) and slack; with a search slack",
        ),
    ] = None,
    qps: Annotated[
        list[float] | None, typer.Option(help="Offered rate (requests/s); repeatable.", show_default="20")
    ] = None,
    hold: Annotated[
        float | None,
        typer.Option(help="Find the highest rate that keeps this SLO adherence, such as 0.9. Replaces --qps."),
    ] = None,
    step_mode: Annotated[
        str, typer.Option(help="chunked (current vLLM) or prefill-first (vLLM 0.6, whole prompts).")
    ] = "chunked",
    requests: Requests = None,
    duration: Duration = None,
    arrivals: Arrivals = "poisson",
    burstiness: Burstiness = 1.0,
    trace: Trace = None,
    speed: Speed = 1.0,
    window: Window = None,
    rate_scale: RateScale = 1.0,
    trace_unit: TraceUnit = None,
    trace_block_tokens: TraceBlockTokens = None,
    trace_model: TraceModel = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A gateway's configuration. Requests have its SLO classes, and --mix names them: chat=3,batch=1. Its "
            "policy and routing apply unless --policy and --routing choose others."
        ),
    ] = None,
    slo_table: SloTable = "llama-3.1-8b",
    slo_scale: SloScale = 1.0,
    mix: Mix = None,
    max_prompt: MaxPrompt = None,
    max_output: MaxOutput = None,
    predictor: Annotated[
        str,
        typer.Option(help="Length predictor: shipped[:FACTOR], oracle, noise:SIGMA, constant or reversed."),
    ] = "shipped",
    replicas: Annotated[
        str,
        typer.Option(help="Number of engines behind the gateway, or search: the fewest that keep --target."),
    ] = "1",
    target: Annotated[
        float, typer.Option(help="SLO adherence of --replicas search: the share of all requests that must attain it.")
    ] = 0.99,
    routing: Annotated[
        str, typer.Option(help="How the gateway's router chooses among the engines (docs/routing.md).")
    ] = "least_load",
    gateways: Annotated[
        int, typer.Option(min=1, help="Gateways that divide the engines; each request goes to a random one.")
    ] = 1,
    profiles: Annotated[
        list[str] | None,
        typer.Option(
            help="Profiles of further engines, which take turns with --profile: 8 replicas with one of them are 4 and "
            "4; repeatable.",
            show_default="all engines alike",
        ),
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="As in vLLM.", show_default=_FROM_PROFILE)] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="As in vLLM.", show_default=_FROM_PROFILE)
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV cache size (tokens).", show_default=_FROM_PROFILE)
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Context length (tokens).", show_default=_FROM_PROFILE)
    ] = None,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Prefix caching in the engine. Prompts of multi-turn, agents and traces with hash_ids share prefixes.",
        ),
    ] = True,
    prefix_index: Annotated[
        bool,
        typer.Option(
            "--prefix-index/--no-prefix-index",
            help="Prediction of prefix-cache hits in the gateway. Without, policies plan with whole prompts.",
        ),
    ] = True,
    step_jitter: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Random variation of each step's time: its standard deviation as a share of it, such as 0.1.",
        ),
    ] = 0.0,
    draft_tokens: Annotated[
        int, typer.Option(min=0, help="Speculative decoding: drafts per decode, vLLM's num_speculative_tokens.")
    ] = 0,
    draft_acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="Probability that a draft is accepted if those before it are.")
    ] = 0.6,
    draft_ms: Annotated[float, typer.Option(min=0, help="Milliseconds that making drafts adds to a step.")] = 0.0,
    fail: Annotated[
        list[str] | None,
        typer.Option(help="An engine dies: SECONDS, or SECONDS:REPLICA, counted from 0; repeatable."),
    ] = None,
    cold_start: Annotated[
        float, typer.Option(min=0, help="Seconds until another engine serves in place of one that died.")
    ] = 60.0,
    learn: Annotated[
        bool, typer.Option("--learn/--no-learn", help="Learn step times during the run, as a live gateway does.")
    ] = True,
    colocated_gateway: Annotated[
        bool,
        typer.Option(
            "--colocated-gateway", help="Gateway inside the engine: it reacts to a step before the next starts."
        ),
    ] = False,
    apart: Annotated[bool | None, typer.Option("--apart/--inside", hidden=True)] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Random seed; repeatable.", show_default="0")] = None,
    jobs: Annotated[
        int, typer.Option(min=0, help="Number of processes; 0: one per core. Use 1 for accurate timings.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
    timings: Annotated[
        bool,
        typer.Option(
            "--timings/--no-timings", help="Include wall-clock times, which differ between runs of the same command."
        ),
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Plot goodput and adherence over the rate to a .png, .svg or .pdf. With --replicas search: adherence "
            "over the replicas, and over time."
        ),
    ] = None,
) -> None:
    """Plan capacity and compare policies in virtual time, without a GPU.

    How many requests per second does one A100 serve with 90% of the SLOs attained, under stock vLLM and under slack?

        antares simulate --hold 0.9

    How does slack compare with SCORPIO at the capacity of stock vLLM, and at twice that?

        antares simulate --qps 20 --qps 40 --policy slack --policy scorpio --plot curve.png

    How many requests per second do eight engines serve, half of them H200?

        antares simulate --hold 0.99 --policy slack --replicas 8 --profiles h200-llama3.1-8b --routing headroom

    How many A100s does my traffic need?

        antares simulate --trace traffic.jsonl --replicas search --plot traffic.svg

    How many does it need with the SLO classes and the policy of my gateway?

        antares simulate --trace traffic.csv --replicas search --config antares.yaml --mix chat=3,batch=1
    """
    from engine_adapter.simulated.speculation import RandomAcceptance
    from lab.simulate.checks import check, check_hold
    from lab.simulate.experiment import Experiment, runs_of
    from lab.simulate.lifecycle import Changes, parse_failure
    from lab.simulate.report import print_sizings
    from lab.simulate.sizing import SEARCH, check_search, number_of_replicas, size

    seeds = list(dict.fromkeys(seed or [0]))
    limits = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_tokens": kv_tokens,
        "max_model_len": max_model_len,
    }
    try:
        settings = _settings(context, config)
        defaults = DEFAULT_POLICIES[1:] if replicas == SEARCH else DEFAULT_POLICIES
        policies = list(dict.fromkeys(policy or settings.policies or defaults))
        experiment = Experiment(
            profile=profile,
            workload=_workload(context, settings),
            classes=settings.classes,
            predictor=predictor,
            step_mode=step_mode,
            replicas=number_of_replicas(replicas, len(profiles or ())),
            routing=routing if _is_given(context, "routing") else settings.routing or routing,
            gateways=gateways,
            profiles=tuple(profiles or ()),
            learn=learn,
            colocated_gateway=_resolve_alias(colocated_gateway, apart),
            prefix_caching=prefix_caching,
            prefix_index=prefix_index,
            speculation=RandomAcceptance(draft_tokens, draft_acceptance, draft_ms / 1000) if draft_tokens else None,
            changes=Changes(tuple(map(parse_failure, fail)), cold_start) if fail else None,
            limits={name: limit for name, limit in limits.items() if limit is not None},
            step_jitter=StepJitter(step_jitter, 0.0) if step_jitter else None,
        )
        rates: list[float | None] = [*qps] if qps else [None if experiment.workload["arrivals"] == "trace" else 20.0]
        if hold is not None:
            check_hold(experiment, hold, qps)
            rates = [1.0]
        if replicas == SEARCH:
            check_search(target, hold, rates, gateways, experiment.changes)
        check(experiment, policies, rates, seeds, plot)
    except ValueError as error:
        _usage(str(error))
    except ModuleNotFoundError as error:
        _fail(error)
    workers = jobs or os.cpu_count() or 1
    document: dict[str, Any] = {"runs": []}
    try:
        if replicas == SEARCH:
            document, sizings = size(experiment, policies, rates[0], seeds, target, workers, plot)
            if not as_json:
                print_sizings(sizings, experiment, target)
        elif hold is None:
            document["runs"] = _perform(experiment, runs_of(policies, rates, seeds), workers)
        else:
            document["capacity_qps"] = {}
            for name in policies:
                rate, records = _capacity(experiment, name, seeds, hold, workers)
                document["capacity_qps"][name] = round(rate, 2)
                document["runs"] += records
    except ValueError as error:
        _usage(str(error))
    except OSError as error:
        _fail(error)
    _finish(document, experiment, hold, plot if replicas != SEARCH else None, as_json, timings)


def _settings(context: typer.Context, config: Path | None) -> GatewaySettings:
    """Return what ``--config`` sets. Raises ValueError for a bad file, or if another option sets the bounds too."""
    from lab.simulate.gateway_config import GatewaySettings, read_settings

    if config is None:
        return GatewaySettings()
    if _is_given(context, "slo_table"):
        raise ValueError(f"the bounds are those of the classes of {config}: remove --slo-table, or --config")
    return read_settings(config)


def _workload(context: typer.Context, settings: GatewaySettings) -> dict[str, Any]:
    """Return the arguments of `make_workload`, except rate and seed. Raises ValueError for a bad mix."""
    classes = [slo_class.name for slo_class in settings.classes]
    arguments = workload_arguments(context.params, default_duration_s=60.0, classes=classes)
    table = {"slo_table": settings.slo_table()} if classes else {}
    return {"name": workload_name(context.params), **arguments, **table}


def _is_given(context: typer.Context, option: str) -> bool:
    """Return whether the command has the ``option``, even with its default."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _finish(
    document: dict[str, Any],
    experiment: Experiment,
    hold: float | None,
    plot: Path | None,
    as_json: bool,
    timings: bool,
) -> None:
    """Plot and print the runs of ``document``. A search has printed its table, and drawn its plot."""
    if plot is not None:
        _plot(document["runs"], plot, f"{experiment.profile}, {experiment.workload['name']}")
    if as_json:
        _print_json(document, timings)
    elif "replicas" not in document:
        from lab.simulate.report import print_runs

        print_runs(document, experiment, hold)


def _print_json(document: dict[str, Any], timings: bool) -> None:
    if not timings:
        for record in document["runs"]:
            record.update(dict.fromkeys(_WALL_CLOCK))
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _resolve_alias(colocated_gateway: bool, apart: bool | None) -> bool:
    """Return ``colocated_gateway``, or the value of its old option ``--apart/--inside``, if given."""
    if apart is None:
        return colocated_gateway
    instead = "leave it out" if apart else "use --colocated-gateway"
    console.print(f"antares simulate: {'--apart' if apart else '--inside'} is deprecated: {instead}", markup=False)
    return not apart


def _perform(experiment: Experiment, runs: list[Run], jobs: int) -> list[dict[str, Any]]:
    from lab.simulate.experiment import perform_all

    records = []
    with progress("Simulating", len(runs)) as advance:
        for record in perform_all(experiment, runs, jobs):
            records.append(record)
            advance(f"{record['policy']} at {record['qps']:g}/s")
    return records


def _capacity(
    experiment: Experiment, policy: str, seeds: list[int], hold: float, jobs: int
) -> tuple[float, list[dict[str, Any]]]:
    from lab.simulate.experiment import capacity

    with progress(f"Searching the capacity of {policy}", None) as advance:
        return capacity(
            experiment,
            policy,
            seeds,
            hold,
            jobs=jobs,
            on_try=lambda qps, measured: advance(f"{policy} at {qps:.1f}/s: adherence {measured:.3f}"),
        )


def _plot(runs: list[dict[str, Any]], path: Path, title: str) -> None:
    from lab.records.plot import plot_runs

    try:
        plot_runs(runs, path, title)
    except OSError as error:
        _fail(error)
    console.print(f"Wrote {path}")


def _usage(text: str) -> NoReturn:
    console.print(f"antares simulate: {text}", markup=False)
    raise typer.Exit(2)


def _fail(error: Exception) -> NoReturn:
    console.print(f"antares simulate: {error}", markup=False)
    raise typer.Exit(1) from error
