"""What scheduling costs: one decision of each policy, one step of each gate, and what a shadow adds to a request.

    python -m benchmarks.overhead.decision_cost
    python -m benchmarks.overhead.decision_cost --policy slack --waiting 10000
    python -m benchmarks.overhead.decision_cost --json > docs/results/decision_cost.json
    python -m benchmarks.overhead.decision_cost --page docs/results/decision_cost.json

The objects are those that serve: `gateway.scheduling.admission.AdmissionController` with its queue and policy,
`engine_adapter.gates.composite.Gates`,
`gateway.scheduling.engine_queue.EngineQueue` with its shadows. Requests have the lengths of the ShareGPT workload
and the
TPOT bounds of the
paper's table; deadlines are far, so that as many wait at the last decision as at the first. Two cases:

- *full*: every place in the engine is taken, nothing changes. The policy looks at all that waits and keeps it.
- *turnover*: between two decisions a running request leaves and a new one comes; one may be admitted.

`fcfs` and `mooncake` let nobody wait: their decision is on a burst of so many at once. Times are CPU time, which a busy
machine changes little.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from engine_adapter.engine import EngineState
from engine_adapter.gates.composite import Gates
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import Profile, load_profile
from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.engine_queue import Admitted, EngineQueue
from lab.workload import WorkloadRequest, make_workload

FAR_S = 1e6
"""A TTFT bound that nobody misses while this measures."""

NOW = 1000.0
STEP_S = 0.02
P90_RATIO = 2.0
LET_NOBODY_WAIT = ("fcfs", "mooncake")


@dataclass(slots=True, eq=False)
class Sequence:
    """A decoding sequence, as a gate sees it (`engine_adapter.gates.base.Decoding`)."""

    request_id: str
    tpot_slo_s: float | None
    gate: str
    length: int


def _requests(asked: list[WorkloadRequest], first: int, count: int) -> list[Request]:
    """``count`` requests of the workload from number ``first`` on, which have just come in."""
    made = []
    for number in range(first, first + count):
        one = asked[number % len(asked)]
        slo = Slo(FAR_S + number * 1e-3, one.tpot_slo_s)
        made.append(
            Request(str(number), "chat", NOW, slo, one.prompt_tokens, one.output_tokens, P90_RATIO * one.output_tokens)
        )
    return made


def _books(
    policy: str, profile: Profile, asked: list[WorkloadRequest], waiting: int, running: int
) -> AdmissionController:
    """Books in which ``running`` requests decode, spread over their answers, and ``waiting`` wait."""
    state = EngineState(
        alive=True,
        max_num_seqs=max(1, running),
        max_num_batched_tokens=profile.max_num_batched_tokens,
        max_model_len=profile.max_model_len,
        kv_tokens=profile.kv_tokens,
        step_time=StepTimeModel(times=profile.step_times(), learn=False),
    )
    books = AdmissionController(make_policy(policy), state)
    for number, request in enumerate(_requests(asked, 0, running)):
        request.admitted_s = request.first_token_s = NOW
        request.advance(max(1, round(request.predicted_tokens * (number % 10) / 10)))
        books.running[request.id] = request
    for request in _requests(asked, running, waiting):
        books.submit(request)
    return books


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the garbage collector, which would visit 10,000 requests in the middle of a decision."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _timed(do: Callable[[], Any], prepare: Callable[[], Any], repeats: int) -> list[float]:
    """CPU seconds that ``do`` takes, so many times; each time after ``prepare``."""
    taken = []
    with _undisturbed():
        for _ in range(repeats):
            prepare()
            started = time.thread_time()
            do()
            taken.append(time.thread_time() - started)
    return taken


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum, in microseconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    picked = {
        "p50": statistics.median(ordered),
        "p99": ordered[min(last, int(0.99 * len(ordered)))],
        "max": ordered[-1],
    }
    return {f"{name}_us": round(value * 1e6, 2) for name, value in picked.items()}


def decisions(
    policy: str, profile: Profile, asked: list[WorkloadRequest], waiting: int, running: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """The cost of a decision in each case."""
    about = {"what": "decide", "name": policy, "waiting": waiting, "running": running}
    if policy in LET_NOBODY_WAIT:
        books = _books(policy, profile, asked, 0, running)
        resident = dict(books.running)

        def refill() -> None:
            books.running = dict(resident)
            for request in _requests(asked, running, waiting):
                books.submit(request)

        yield {**about, "case": "burst", **summary(_timed(lambda: books.decide(NOW), refill, max(20, repeats // 10)))}
        return
    books = _books(policy, profile, asked, waiting, running)
    yield {**about, "case": "full", **summary(_timed(lambda: books.decide(NOW), lambda: None, repeats))}
    came = running + waiting

    def turn_over() -> None:
        nonlocal came
        gone = next(iter(books.running.values()), None)
        if gone is not None:
            books.leave(gone)
        for request in books.running.values():
            if request.first_token_s is None:  # admitted a decision ago
                request.first_token_s = NOW
                request.advance(1)
        (newcomer,) = _requests(asked, came, 1)
        books.submit(newcomer)
        came += 1

    yield {**about, "case": "turnover", **summary(_timed(lambda: books.decide(NOW), turn_over, repeats))}


def gate_steps(
    gate: str, profile: Profile, asked: list[WorkloadRequest], running: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """The cost of planning a step, and of hearing how long it took; one request leaves and one comes a step."""
    gates = Gates()
    decoding = [Sequence(r.id, r.slo.tpot_s, gate, int(r.length)) for r in _requests(asked, 0, running)]
    backlog = 2 * profile.max_num_batched_tokens
    plans, reports = [], []
    with _undisturbed():
        for step in range(repeats):
            now = NOW + step * STEP_S
            for sequence in decoding:
                sequence.length += 1
            gates.forget(decoding.pop(0).request_id)
            (r,) = _requests(asked, running + step, 1)
            decoding.append(Sequence(r.id, r.slo.tpot_s, gate, int(r.length)))
            context = sum(sequence.length for sequence in decoding) / running
            prefill_tokens = 256 if step % 2 else 0
            took = profile.step_seconds(running, running * context, prefill_tokens, 0, 1)
            started = time.thread_time()
            gates.plan(now, decoding, backlog)
            planned = time.thread_time()
            gates.observe(running, prefill_tokens, context, took * (1 + 0.05 * (step % 7 - 3) / 3))
            plans.append(planned - started)
            reports.append(time.thread_time() - planned)
    for case, taken in (("plan", plans), ("observe", reports)):
        yield {"what": "gate", "name": gate, "case": case, "waiting": 0, "running": running, **summary(taken)}
    mean_us = statistics.fmean(plans) * 1e6 + statistics.fmean(reports) * 1e6
    yield {"what": "gate", "name": gate, "case": "step, mean", "waiting": 0, "running": running, "mean_us": mean_us}


async def _through_a_lane(asked: list[WorkloadRequest], shadows: list[str], requests: int) -> list[float]:
    """CPU seconds from the submission of a request until it has left again, under `fcfs` with ``shadows`` beside it."""
    engine = SimulatedEngine()
    engine.state.alive = True
    classes = {"chat": SloClass("chat", Slo())}
    beside = {f"{name}-{number}": make_policy(name) for number, name in enumerate(shadows)}
    engine_queue = EngineQueue(engine, make_policy("fcfs"), classes, shadow=beside)
    taken = []
    for request in _requests(asked, 0, requests):
        started = time.thread_time()
        verdict = engine_queue.submit(request)
        while not verdict.done():
            await asyncio.sleep(0)
        engine_queue.leave(request)
        taken.append(time.thread_time() - started)
        assert isinstance(verdict.result(), Admitted)
    engine_queue.close()
    return taken


def shadow_cost(asked: list[WorkloadRequest], requests: int) -> Iterator[dict[str, Any]]:
    """What a request's way through a lane costs without, with one, and with two shadows."""
    for shadows in ([], ["scorpio"], ["scorpio", "mooncake"]):
        taken = asyncio.run(_through_a_lane(asked, shadows, requests))
        name = " and ".join(shadows) or "none"
        yield {"what": "shadow", "name": name, "case": "request", "waiting": 0, "running": 0, **summary(taken)}


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for a person."""
    drawn = Table(title="What scheduling costs (microseconds of CPU time)")
    for head in ("what", "name", "case", "waiting", "running", "p50", "p99", "max"):
        drawn.add_column(head, justify="left" if head in {"what", "name", "case"} else "right")
    for row in rows:
        if "mean_us" in row:
            continue
        figures = (f"{row[key]:,.1f}" for key in ("p50_us", "p99_us", "max_us"))
        drawn.add_row(row["what"], row["name"], row["case"], f"{row['waiting']:,}", f"{row['running']:,}", *figures)
    return drawn


def page(found: dict[str, Any]) -> str:
    """The same in Markdown, with the command that makes it again."""
    made = found["made_with"]
    lines = [
        "# What scheduling costs",
        "",
        f"**CPU time** on one of two shared cores, microseconds, over {made['repeats']} decisions of a kind "
        f"(profile {made['profile']}, seed {made['seed']}). *full*: nothing changes, the policy looks at all that "
        "waits. *turnover*: one request has left, one has come. *burst*: so many at once, for policies that let nobody "
        "wait. A gate's step is *plan* and *observe*; every 128th of the latter fits the step times anew. *shadow*: a "
        "request's way through the gateway's books with so many shadow policies beside the active one.",
        "",
        "```",
        "python -m benchmarks.overhead.decision_cost --json > docs/results/decision_cost.json",
        "python -m benchmarks.overhead.decision_cost --page docs/results/decision_cost.json",
        "```",
        "",
        "| what | name | case | waiting | running | median | 99th percentile | mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["costs"]:
        figures = (f"{row[key]:,.0f}" if key in row else "" for key in ("p50_us", "p99_us", "mean_us"))
        sizes = (f"{row[key]:,}" if row[key] else "" for key in ("waiting", "running"))
        lines.append(
            f"| {row['what']} | `{row['name']}` | {row['case']} | {' | '.join(sizes)} | {' | '.join(figures)} |"
        )
    return "\n".join(lines) + "\n"


def main(
    policy: Annotated[list[str] | None, typer.Option(help="Repeat for several. [default: all]")] = None,
    waiting: Annotated[
        list[int] | None, typer.Option(help="Requests that wait; repeat. [default: 1000, 10000]")
    ] = None,
    running: Annotated[int, typer.Option(min=1, help="Requests that run.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Decisions of a kind that are timed.")] = 300,
    profile: Annotated[str, typer.Option(help="Whose step times.")] = "a100-llama3.1-8b",
    seed: Annotated[int, typer.Option(help="Of the requests' sizes.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    page_of: Annotated[
        Path | None, typer.Option("--page", help="Write the page of this JSON beside it, and end.")
    ] = None,
) -> None:
    """Time decisions, gates and shadows on this machine."""
    if page_of is not None:
        page_of.with_suffix(".md").write_text(page(json.loads(page_of.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    known = load_profile(profile)
    asked = make_workload("sharegpt", qps=1.0, requests=2048, seed=seed)
    rows: list[dict[str, Any]] = []
    for count in waiting or [1000, 10_000]:
        for name in policy or POLICIES:
            rows += decisions(name, known, asked, count, running, repeats)
    for gate in ("open", "credit", "slack"):
        rows += gate_steps(gate, known, asked, running, 10 * repeats)
    rows += shadow_cost(asked, 20 * repeats)
    if as_json:
        json.dump(
            {"made_with": {"profile": profile, "seed": seed, "repeats": repeats}, "costs": rows}, sys.stdout, indent=2
        )
        sys.stdout.write("\n")
    else:
        Console(width=max(Console().width, 112)).print(table(rows))


if __name__ == "__main__":
    typer.run(main)
