"""`antares bench`: send a workload to an OpenAI-compatible server and report SLO adherence and latency."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    from lab.bench.load_client import OnProgress, Target
    from lab.workload import WorkloadRequest

LATE_S = 0.010
"""Limit on the client's lateness (s, 99th percentile). Above it the command warns that the client distorts results."""


class BenchError(Exception):
    """The measurement failed; the message gives the reason and the fix."""


def bench(
    context: typer.Context,
    url: Annotated[str | None, typer.Argument(help="URL of the server, such as http://127.0.0.1:8000.")] = None,
    url_option: Annotated[str | None, typer.Option("--url", help="URL of the server, as an option.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name.", show_default="first of /v1/models")] = None,
    workload: Workload = "sharegpt",
    arrivals: Arrivals = "poisson",
    qps: Annotated[list[float] | None, typer.Option(help="Offered rate (requests/s); repeatable.")] = None,
    requests: Requests = None,
    duration: Duration = None,
    burstiness: Burstiness = 1.0,
    trace: Trace = None,
    speed: Speed = 1.0,
    window: Window = None,
    rate_scale: RateScale = 1.0,
    trace_unit: TraceUnit = None,
    trace_block_tokens: TraceBlockTokens = None,
    trace_model: TraceModel = None,
    slo_table: SloTable = "llama-3.1-8b",
    slo_scale: SloScale = 1.0,
    mix: Mix = None,
    max_prompt: MaxPrompt = None,
    max_output: MaxOutput = None,
    seed: Annotated[list[int] | None, typer.Option(help="Random seed; repeatable.", show_default="0")] = None,
    policy: Annotated[str, typer.Option(help="Label of the server in the results.")] = "server",
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    prompt_style: Annotated[
        str | None,
        typer.Option(
            help="ids (token ids of exact length) or words (text of about that length). Chat accepts only words."
        ),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for exact output lengths (an extension of vLLM).")] = True,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sampling temperature; 0 is greedy.", show_default="from the server")
    ] = None,
    max_connections: Annotated[
        int, typer.Option(help="Maximum number of connections; 0 is unlimited (open loop).")
    ] = 0,
    timeout: Annotated[float, typer.Option(help="Maximum time for one answer (s).")] = 600.0,
    warmup: Annotated[int, typer.Option(help="Number of trial requests before the measurement.")] = 1,
    bounds_profile: Annotated[
        str | None,
        typer.Option(help="Step-time profile of the hardware: adds upper bounds on adherence to the results."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot goodput and adherence over the rate to a .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Measure an OpenAI-compatible server under a workload in which every request has SLOs."""
    from lab.workload import make_workload

    try:
        target = _target(url, url_option, model, endpoint, prompt_style, ignore_eos, api_key, timeout, max_connections)
        target = replace(target, temperature=temperature)
        arguments = workload_arguments(context.params)
        if qps is None and arguments["arrivals"] != "trace":
            raise ValueError("set at least one --qps")
        rates: list[float | None] = [*qps] if qps else [None]
        planned = [
            (rate, run_seed, make_workload(workload_name(context.params), qps=rate, seed=run_seed, **arguments))
            for rate in rates
            for run_seed in (seed or [0])
        ]
        if not all(run_workload for _, _, run_workload in planned):
            raise ValueError("the workload has no requests: raise --duration or --requests")
        costs = _costs(bounds_profile)
        if plot is not None:
            from lab.records.plot import check_plot

            check_plot(plot)
    except ValueError as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(2) from error
    except ModuleNotFoundError as error:
        typer.echo(f"antares: bench needs {error.name}: pip install -e '.[bench]' in your clone", err=True)
        raise typer.Exit(1) from error
    try:
        target = _warm_up(target, planned[0][2][0], warmup)
        runs = [_run(target, policy, rate, run_seed, requests, costs) for rate, run_seed, requests in planned]
    except BenchError as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    made_with = {"url": target.url, "model": target.model, "endpoint": target.endpoint, "workload": workload}
    _show(runs, made_with | arguments, as_json=as_json, plot=plot)
    _warn(runs)


def _target(
    url: str | None,
    url_option: str | None,
    model: str | None,
    endpoint: str,
    prompt_style: str | None,
    ignore_eos: bool,
    api_key: str | None,
    timeout: float,
    max_connections: int,
) -> Target:
    """Return the target that the options describe.

    Raises:
        ValueError: an option is missing, invalid or contradicts another one.
    """
    from lab.bench.load_client import Target

    if (url is None) == (url_option is None):
        raise ValueError("set the URL of the server exactly once, such as: antares bench http://127.0.0.1:8000")
    base = (url or url_option or "").rstrip("/").removesuffix("/v1").rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"invalid URL {base!r}: it must begin with http:// or https://")
    if endpoint not in ("completions", "chat"):
        raise ValueError(f"unknown endpoint {endpoint!r}: choose completions or chat")
    style = prompt_style or ("words" if endpoint == "chat" else "ids")
    if style not in ("ids", "words"):
        raise ValueError(f"unknown prompt style {style!r}: choose ids or words")
    if endpoint == "chat" and style == "ids":
        raise ValueError("chat accepts only text: use --prompt-style words")
    if timeout <= 0 or max_connections < 0:
        raise ValueError("--timeout must be positive and --max-connections at least 0")
    return Target(base, model or "", endpoint, style, ignore_eos, api_key or None, timeout, max_connections)


def _costs(profile: str | None) -> list[Any] | None:
    if profile is None:
        return None
    from engine_adapter.step_time.profile import load_profile
    from lab.bounds import token_costs

    return token_costs(load_profile(profile))


def _warm_up(target: Target, sample: WorkloadRequest, warmup: int) -> Target:
    """Send ``warmup`` trial requests and return the target with its model filled in.

    Raises:
        BenchError: the server is unreachable, lists no model, or answers a trial request with an error.
    """
    from dataclasses import replace

    import httpx
    import numpy as np

    # A short request is enough to see whether the server accepts the format.
    trial = replace(sample, prompt_tokens=min(sample.prompt_tokens, 64), output_tokens=min(sample.output_tokens, 8))
    # The load client ignores proxies from the environment too.
    with httpx.Client(base_url=target.url, headers=target.headers(), timeout=target.timeout_s, trust_env=False) as http:
        try:
            if not target.model:
                response = http.get("/v1/models", timeout=min(30.0, target.timeout_s))
                cards = response.json().get("data") if response.status_code == 200 else None
                if not cards:
                    raise BenchError(
                        f"{target.url}/v1/models lists no model (HTTP {response.status_code}): set --model"
                    )
                target = replace(target, model=str(cards[0]["id"]))
            for index in range(warmup):
                response = http.post(target.path, content=target.body(trial, np.random.default_rng(index)))
                if response.status_code not in (200, 429):
                    raise BenchError(
                        f"{target.url} answered a trial request with HTTP {response.status_code}: {response.text[:300]}"
                    )
        except httpx.ConnectError as error:
            raise BenchError(f"cannot connect to {target.url} ({error})") from error
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            raise BenchError(f"{target.url} is not an OpenAI-compatible server: {error!r}") from error
    return target


def _run(
    target: Target, policy: str, qps: float | None, seed: int, workload: list[WorkloadRequest], costs: list[Any] | None
) -> dict[str, Any]:
    """Run one measurement and return its run record."""
    import asyncio
    import time

    from lab.bench.load_client import send_from_another_process
    from lab.bounds import bounds
    from lab.records.run_record import run_record

    rate = qps if qps is not None else len(workload) / max(workload[-1].at_s, 1e-9)
    started = time.monotonic()
    with _progress(f"{policy} at {rate:g}/s, seed {seed}", len(workload)) as on_progress:
        try:
            result = asyncio.run(send_from_another_process(target, workload, seed, on_progress))
        except RuntimeError as error:
            raise BenchError(str(error)) from error
    extras = result.extras()
    return run_record(
        policy,
        rate,
        seed,
        result.results(),
        result.duration_s,
        wall_s=time.monotonic() - started,
        bounds=bounds(workload, costs) if costs else None,
        client_late=extras["client_lateness_p99_s"] > LATE_S,
        **extras,
    )


@contextlib.contextmanager
def _progress(label: str, total: int) -> Iterator[OnProgress | None]:
    """Show a progress bar on stderr, if that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        sent_bar = progress.add_task(f"{label}: sent", total=total)
        done_bar = progress.add_task(f"{label}: done", total=total)

        def on_progress(sent: int, done: int) -> None:
            progress.update(sent_bar, completed=sent)
            progress.update(done_bar, completed=done)

        yield on_progress


def _show(runs: list[dict[str, Any]], made_with: dict[str, Any], *, as_json: bool, plot: Path | None) -> None:
    if as_json:
        json.dump({"made_with": made_with, "runs": runs}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        from rich.console import Console

        from lab.records.table import runs_table

        # Rich assumes 80 columns for a pipe, which would truncate the table.
        Console(width=max(Console().width, 112)).print(runs_table(runs))
    if plot is None:
        return
    from lab.records.plot import plot_runs

    try:
        plot_runs(runs, plot)
    except (ModuleNotFoundError, ValueError, OSError) as error:
        typer.echo(f"antares: cannot write the plot: {error}", err=True)
        raise typer.Exit(1) from error


def _warn(runs: list[dict[str, Any]]) -> None:
    """Warn about a late client and short answers. Exit with 1 if every request of a run failed."""
    from rich.console import Console

    console = Console(stderr=True)
    latest = max(run["client_lateness_p99_s"] for run in runs)
    if latest > LATE_S:
        console.print(
            f"[bold red]The load client was late:[/] {latest * 1000:.0f} ms at the 99th percentile. Latencies include "
            "this delay. Run the client on another machine, or at a lower rate."
        )
    short = max(run["short_answers"] for run in runs)
    if short > 0:
        console.print(f"[bold red]Up to {short:.1%} of the answers were shorter than requested:[/] see docs/bench.md.")
    for run in runs:
        if run["failed"] == 1:
            reason = next(iter(run["reasons"]), "unknown reason")
            typer.echo(f"antares: every request failed at {run['qps']:g}/s: {reason}", err=True)
            raise typer.Exit(1)
