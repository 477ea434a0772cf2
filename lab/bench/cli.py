"""`antares bench`: send a workload to any live OpenAI-compatible server and say what it made of it."""

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
    from lab.bench.load_client import OnProgress, Sent, Target
    from lab.workload import WorkloadRequest

LATE_S = 0.010
"""A client whose 99th percentile of lateness is above this (s) says so loudly: its figures are partly its own."""


class BenchError(Exception):
    """The measurement cannot be made; the message says why and what to do."""


def bench(
    context: typer.Context,
    url: Annotated[str | None, typer.Argument(help="The server, such as http://127.0.0.1:8000.")] = None,
    url_option: Annotated[str | None, typer.Option("--url", help="The same, as an option.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the first of the server's /v1/models.")] = None,
    workload: Workload = "sharegpt",
    arrivals: Arrivals = "poisson",
    qps: Annotated[list[float] | None, typer.Option(help="Requests per second; repeat for a run each.")] = None,
    requests: Requests = None,
    duration: Duration = None,
    burstiness: Burstiness = 1.0,
    trace: Trace = None,
    speed: Speed = 1.0,
    window: Window = None,
    slo_table: SloTable = "llama-3.1-8b",
    slo_scale: SloScale = 1.0,
    mix: Mix = None,
    max_prompt: MaxPrompt = None,
    max_output: MaxOutput = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat for a run each at every rate. Default: 0.")] = None,
    policy: Annotated[str, typer.Option(help="What to call the server in the results.")] = "server",
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    prompt_style: Annotated[
        str | None,
        typer.Option(help="ids: exactly so many token ids; words: text of about so many. Chat takes words only."),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for exactly the workload's lengths (vLLM's extension).")] = True,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of the sampling; 0 is greedy.", show_default="the server's")
    ] = None,
    max_connections: Annotated[int, typer.Option(help="0: as many as it takes (open loop).")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which an answer counts as failed.")] = 600.0,
    warmup: Annotated[int, typer.Option(help="Requests sent one by one before anything is measured.")] = 1,
    bounds_profile: Annotated[
        str | None, typer.Option(help="A step-time profile: adds what no scheduler could pass on that hardware.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write goodput and adherence over the rate to this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure any OpenAI-compatible server under a workload whose every request carries its SLO."""
    from lab.workload import make_workload

    try:
        target = _target(url, url_option, model, endpoint, prompt_style, ignore_eos, api_key, timeout, max_connections)
        target = replace(target, temperature=temperature)
        asked_for = workload_arguments(context.params)
        if qps is None and arrivals != "trace":
            raise ValueError("give at least one --qps")
        rates: list[float | None] = [*qps] if qps else [None]
        work = [
            (rate, one_seed, make_workload(workload, qps=rate, seed=one_seed, **asked_for))
            for rate in rates
            for one_seed in (seed or [0])
        ]
        if not all(asked for _, _, asked in work):
            raise ValueError("the workload has no requests: a longer --duration, or --requests")
        costs = _costs(bounds_profile)
        if plot is not None:
            from lab.records.plot import check_plot

            check_plot(plot)
    except ValueError as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(2) from error
    except ModuleNotFoundError as error:
        typer.echo(f"antares: bench needs {error.name}: pip install 'antares-gateway[bench]'", err=True)
        raise typer.Exit(1) from error
    try:
        target = _reached(target, work[0][2][0], warmup)
        runs = [_run(target, policy, rate, one_seed, asked, costs) for rate, one_seed, asked in work]
    except BenchError as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    made_with = {"url": target.url, "model": target.model, "endpoint": target.endpoint, "workload": workload}
    _show(runs, made_with | asked_for, as_json=as_json, plot=plot)
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
    """What the options say about the server; raises `ValueError`."""
    from lab.bench.load_client import Target

    if (url is None) == (url_option is None):
        raise ValueError("give the server's URL, once: antares bench http://127.0.0.1:8000")
    base = (url or url_option or "").rstrip("/").removesuffix("/v1").rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"{base!r} is no URL: it must begin with http:// or https://")
    if endpoint not in ("completions", "chat"):
        raise ValueError(f"unknown endpoint {endpoint!r}: choose completions or chat")
    style = prompt_style or ("words" if endpoint == "chat" else "ids")
    if style not in ("ids", "words"):
        raise ValueError(f"unknown prompt style {style!r}: choose ids or words")
    if endpoint == "chat" and style == "ids":
        raise ValueError("chat takes text: --prompt-style words")
    if timeout <= 0 or max_connections < 0:
        raise ValueError("--timeout must be positive, --max-connections not negative")
    return Target(base, model or "", endpoint, style, ignore_eos, api_key or None, timeout, max_connections)


def _costs(profile: str | None) -> list[Any] | None:
    if profile is None:
        return None
    from engine_adapter.step_time.profile import load_profile
    from lab.bounds import works

    return works(load_profile(profile))


def _reached(target: Target, sample: WorkloadRequest, warmup: int) -> Target:
    """The target with its model known, after ``warmup`` answered requests. Raises `BenchError`."""
    from dataclasses import replace

    import httpx
    import numpy as np

    # Short, so that a slow server is not waited for; what matters is whether it takes such requests at all.
    trial = replace(sample, prompt_tokens=min(sample.prompt_tokens, 64), output_tokens=min(sample.output_tokens, 8))
    # No proxies from the environment: the load client uses none either.
    with httpx.Client(base_url=target.url, headers=target.headers(), timeout=target.timeout_s, trust_env=False) as http:
        try:
            if not target.model:
                found = http.get("/v1/models", timeout=min(30.0, target.timeout_s))
                cards = found.json().get("data") if found.status_code == 200 else None
                if not cards:
                    raise BenchError(f"{target.url}/v1/models names no model (HTTP {found.status_code}): give --model")
                target = replace(target, model=str(cards[0]["id"]))
            for which in range(warmup):
                answer = http.post(target.path, content=target.body(trial, np.random.default_rng(which)))
                if answer.status_code not in (200, 429):
                    raise BenchError(
                        f"{target.url} refuses a trial request (HTTP {answer.status_code}): {answer.text[:300]}"
                    )
        except httpx.ConnectError as error:
            raise BenchError(f"nothing answers at {target.url} ({error})") from error
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            raise BenchError(f"{target.url} does not answer as an OpenAI server does: {error!r}") from error
    return target


def _run(
    target: Target, policy: str, qps: float | None, seed: int, asked: list[WorkloadRequest], costs: list[Any] | None
) -> dict[str, Any]:
    import asyncio
    import time

    from lab.bench.load_client import send_from_another_process
    from lab.bounds import bounds
    from lab.records.run_record import run_record

    rate = qps if qps is not None else len(asked) / max(asked[-1].at_s, 1e-9)
    started = time.monotonic()
    with _progress(f"{policy} at {rate:g}/s, seed {seed}", len(asked)) as on_progress:
        try:
            sent: Sent = asyncio.run(send_from_another_process(target, asked, seed, on_progress))
        except RuntimeError as error:
            raise BenchError(str(error)) from error
    extras = sent.extras()
    return run_record(
        policy,
        rate,
        seed,
        sent.served(),
        sent.duration_s,
        wall_s=time.monotonic() - started,
        bounds=bounds(asked, costs) if costs else None,
        client_late=extras["client_lateness_p99_s"] > LATE_S,
        **extras,
    )


@contextlib.contextmanager
def _progress(label: str, total: int) -> Iterator[OnProgress | None]:
    """A bar on standard error, if that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        sending = progress.add_task(f"{label}: sent", total=total)
        done_with = progress.add_task(f"{label}: done", total=total)

        def on_progress(sent: int, done: int) -> None:
            progress.update(sending, completed=sent)
            progress.update(done_with, completed=done)

        yield on_progress


def _show(runs: list[dict[str, Any]], made_with: dict[str, Any], *, as_json: bool, plot: Path | None) -> None:
    if as_json:
        json.dump({"made_with": made_with, "runs": runs}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        from rich.console import Console

        from lab.records.table import runs_table

        # Wider than a pipe's 80 columns: better long lines than cut figures.
        Console(width=max(Console().width, 112)).print(runs_table(runs))
    if plot is None:
        return
    from lab.records.plot import plot_runs

    try:
        plot_runs(runs, plot)
    except (ModuleNotFoundError, ValueError, OSError) as error:
        typer.echo(f"antares: no plot: {error}", err=True)
        raise typer.Exit(1) from error


def _warn(runs: list[dict[str, Any]]) -> None:
    """Say what spoils the figures; exit 1 when a run has none."""
    from rich.console import Console

    console = Console(stderr=True)
    latest = max(run["client_lateness_p99_s"] for run in runs)
    if latest > LATE_S:
        console.print(
            f"[bold red]The load client itself was late:[/] {latest * 1000:.0f} ms at the 99th percentile. These "
            "figures are partly its own. Run it on another machine, or at a lower rate."
        )
    short = max(run["short_answers"] for run in runs)
    if short > 0:
        console.print(f"[bold red]Up to {short:.1%} of the answers were shorter than asked for:[/] see docs/bench.md.")
    for run in runs:
        if run["failed"] == 1:
            why = next(iter(run["reasons"]), "no reason known")
            typer.echo(f"antares: every request failed at {run['qps']:g}/s: {why}", err=True)
            raise typer.Exit(1)
