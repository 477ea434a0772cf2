"""Measures the CPU time of scheduling: a decision of each policy, a step of each gate, a request with shadow policies.

    python -m benchmarks.overhead.decision_cost
    python -m benchmarks.overhead.decision_cost --policy slack --waiting 10000
    python -m benchmarks.overhead.decision_cost --json > docs/results/decision_cost.json
    python -m benchmarks.overhead.decision_cost --page docs/results/decision_cost.json

The measured objects are those of production: `gateway.scheduling.admission.AdmissionController` with its queue and
policy, `engine_adapter.gates.composite.Gates`, and `gateway.scheduling.engine_queue.EngineQueue` with its shadows.
Requests have the lengths of the ShareGPT workload and the TPOT bounds of the paper's table. Their deadlines are far
away, so that the number of waiting requests stays constant. Cases:

- *full*: all slots of the engine are taken and nothing changes. The policy examines and keeps all waiting requests.
- *turnover*: between two decisions one running request leaves and one request arrives; one may be admitted.
- *burst*: `fcfs` and `mooncake` never leave a request waiting, so they decide on a burst of new requests.

Times are CPU times, which depend little on other load of the machine.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import results_json
from benchmarks.command import AsJson, PageOf, write_page
from benchmarks.markdown import table as markdown_table
from benchmarks.markdown import wrapped
from engine_adapter.engine import EngineState
from engine_adapter.gates.composite import Gates
from engine_adapter.service_kind import ServiceKind
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_report import StepReport
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import Profile, load_profile
from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.queue_outcome import Admitted
from lab.workload import WorkloadRequest, make_workload

FAR_S = 1e6
"""TTFT bound in seconds that no request misses during the measurement."""

NOW = 1000.0
STEP_S = 0.02
P90_RATIO = 2.0
NO_QUEUE = ("fcfs", "mooncake")
"""Policies that never leave a request waiting."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A decoding sequence for a gate (`engine_adapter.gates.base.Decoding`)."""

    request_id: str
    kind: ServiceKind
    pace_s: float | None
    gate: str
    length: int
    drafts: int = 0


def _requests(workload: list[WorkloadRequest], first: int, count: int) -> list[Request]:
    """``count`` new requests with the sizes of the workload, from number ``first`` on."""
    made = []
    for number in range(first, first + count):
        one = workload[number % len(workload)]
        slo = Slo(FAR_S + number * 1e-3, one.tpot_slo_s)
        made.append(
            Request(str(number), "chat", NOW, slo, one.prompt_tokens, one.output_tokens, P90_RATIO * one.output_tokens)
        )
    return made


def loaded_controller(
    policy: str, profile: Profile, workload: list[WorkloadRequest], waiting: int, running: int
) -> AdmissionController:
    """A controller with ``running`` requests at different points of their answers, and ``waiting`` waiting requests."""
    state = EngineState(
        alive=True,
        max_num_seqs=max(1, running),
        max_num_batched_tokens=profile.max_num_batched_tokens,
        max_model_len=profile.max_model_len,
        kv_tokens=profile.kv_tokens,
        step_time=StepTimeModel(times=profile.step_times(), learn=False),
    )
    controller = AdmissionController(make_policy(policy), state)
    for number, request in enumerate(_requests(workload, 0, running)):
        request.admitted_s = request.first_token_s = NOW
        request.advance(max(1, round(request.predicted_tokens * (number % 10) / 10)))
        controller.running[request.id] = request
    for request in _requests(workload, running, waiting):
        controller.submit(request)
    return controller


@contextmanager
def _without_gc() -> Iterator[None]:
    """Disable the garbage collector, which would scan 10,000 requests in the middle of a decision."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _timed(do: Callable[[], Any], prepare: Callable[[], Any], repeats: int) -> list[float]:
    """CPU seconds of each of ``repeats`` calls of ``do``, each after an untimed call of ``prepare``."""
    times_s = []
    with _without_gc():
        for _ in range(repeats):
            prepare()
            started = time.thread_time()
            do()
            times_s.append(time.thread_time() - started)
    return times_s


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
    policy: str, profile: Profile, workload: list[WorkloadRequest], waiting: int, running: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """The CPU time of a decision in each case of the policy."""
    about = {"what": "decide", "name": policy, "waiting": waiting, "running": running}
    if policy in NO_QUEUE:
        controller = loaded_controller(policy, profile, workload, 0, running)
        resident = dict(controller.running)

        def refill() -> None:
            controller.running = dict(resident)
            for request in _requests(workload, running, waiting):
                controller.submit(request)

        times_s = _timed(lambda: controller.decide(NOW), refill, max(20, repeats // 10))
        yield {**about, "case": "burst", **summary(times_s)}
        return
    controller = loaded_controller(policy, profile, workload, waiting, running)
    yield {**about, "case": "full", **summary(_timed(lambda: controller.decide(NOW), lambda: None, repeats))}
    arrived = running + waiting

    def turn_over() -> None:
        nonlocal arrived
        finished = next(iter(controller.running.values()), None)
        if finished is not None:
            controller.leave(finished)
        for request in controller.running.values():
            if request.first_token_s is None:  # admitted by the previous decision
                request.first_token_s = NOW
                request.advance(1)
        (new_request,) = _requests(workload, arrived, 1)
        controller.submit(new_request)
        arrived += 1

    yield {**about, "case": "turnover", **summary(_timed(lambda: controller.decide(NOW), turn_over, repeats))}


def gate_steps(
    gate: str, profile: Profile, workload: list[WorkloadRequest], running: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """The CPU time to plan a step and to observe its duration. In each step one request leaves and one arrives."""
    gates = Gates()
    decoding = [Sequence(r.id, r.kind, r.pace_s, gate, int(r.length)) for r in _requests(workload, 0, running)]
    backlog = 2 * profile.max_num_batched_tokens
    plan_s, observe_s = [], []
    with _without_gc():
        for step in range(repeats):
            now = NOW + step * STEP_S
            for sequence in decoding:
                sequence.length += 1
            gates.forget(decoding.pop(0).request_id)
            (r,) = _requests(workload, running + step, 1)
            decoding.append(Sequence(r.id, r.kind, r.pace_s, gate, int(r.length)))
            context = sum(sequence.length for sequence in decoding) / running
            prefill_tokens = 256 if step % 2 else 0
            step_s = profile.step_seconds(running, running * context, prefill_tokens, 0, 1)
            started = time.thread_time()
            gates.plan(now, decoding, backlog)
            planned = time.thread_time()
            gates.observe(StepReport(running, prefill_tokens, context, step_s * (1 + 0.05 * (step % 7 - 3) / 3)))
            plan_s.append(planned - started)
            observe_s.append(time.thread_time() - planned)
    for case, times_s in (("plan", plan_s), ("observe", observe_s)):
        yield {"what": "gate", "name": gate, "case": case, "waiting": 0, "running": running, **summary(times_s)}
    mean_us = statistics.fmean(plan_s) * 1e6 + statistics.fmean(observe_s) * 1e6
    yield {"what": "gate", "name": gate, "case": "step, mean", "waiting": 0, "running": running, "mean_us": mean_us}


async def _request_times(workload: list[WorkloadRequest], shadows: list[str], requests: int) -> list[float]:
    """CPU seconds of each request from submission until it leaves, under `fcfs` with ``shadows``."""
    engine = SimulatedEngine()
    engine.state.alive = True
    classes = {"chat": SloClass("chat", Slo())}
    shadow_policies = {f"{name}-{number}": make_policy(name) for number, name in enumerate(shadows)}
    engine_queue = EngineQueue(engine, make_policy("fcfs"), classes, shadow=shadow_policies)
    times_s = []
    for request in _requests(workload, 0, requests):
        started = time.thread_time()
        answer = engine_queue.submit(request)
        while not answer.done():
            await asyncio.sleep(0)
        engine_queue.leave(request)
        times_s.append(time.thread_time() - started)
        assert isinstance(answer.result(), Admitted)
    engine_queue.close()
    return times_s


def shadow_cost(workload: list[WorkloadRequest], requests: int) -> Iterator[dict[str, Any]]:
    """The CPU time of a request in the `EngineQueue` with zero, one and two shadow policies."""
    for shadows in ([], ["scorpio"], ["scorpio", "mooncake"]):
        times_s = asyncio.run(_request_times(workload, shadows, requests))
        name = " and ".join(shadows) or "none"
        yield {"what": "shadow", "name": name, "case": "request", "waiting": 0, "running": 0, **summary(times_s)}


def table(rows: list[dict[str, Any]]) -> Table:
    """The costs as a table for the terminal."""
    drawn = Table(title="CPU time of scheduling, in microseconds")
    for head in ("what", "name", "case", "waiting", "running", "p50", "p99", "max"):
        drawn.add_column(head, justify="left" if head in {"what", "name", "case"} else "right")
    for row in rows:
        if "mean_us" in row:
            continue
        times = (f"{row[key]:,.1f}" for key in ("p50_us", "p99_us", "max_us"))
        drawn.add_row(row["what"], row["name"], row["case"], f"{row['waiting']:,}", f"{row['running']:,}", *times)
    return drawn


def page(found: dict[str, Any]) -> str:
    """The page: the cases, the command, and the table."""
    made_with = found["made_with"]
    rows = []
    for row in found["costs"]:
        sizes = [f"{row[key]:,}" if row[key] else "" for key in ("waiting", "running")]
        times = [f"{row[key]:,.0f}" if key in row else "" for key in ("p50_us", "p99_us", "mean_us")]
        rows.append([row["what"], f"`{row['name']}`", row["case"], *sizes, *times])
    heads = ["what", "name", "case", "waiting", "running", "median", "99th percentile", "mean"]
    text = f"""# CPU time of scheduling

**CPU time** in microseconds on one of two shared cores. {made_with["repeats"]} decisions per case, profile
{made_with["profile"]}, seed {made_with["seed"]}.

- *full*: nothing changes, and the policy examines all waiting requests.
- *turnover*: one request has left, and one has arrived.
- *burst*: all requests arrive at once, for policies that never leave a request waiting.
- *gate*: a step consists of *plan* and *observe*. Every 128th *observe* fits the step times again.
- *shadow*: the time of one request in the `EngineQueue`, with the shadow policies of that row.

```
python -m benchmarks.overhead.decision_cost --json > docs/results/decision_cost.json
python -m benchmarks.overhead.decision_cost --page docs/results/decision_cost.json
```

{markdown_table(heads, rows)}
"""
    return wrapped(text) + "\n"


def main(
    policy: Annotated[list[str] | None, typer.Option(help="Repeat for several. [default: all]")] = None,
    waiting: Annotated[list[int] | None, typer.Option(help="Waiting requests; repeat. [default: 1000, 10000]")] = None,
    running: Annotated[int, typer.Option(min=1, help="Running requests.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Timed decisions per case.")] = 300,
    profile: Annotated[str, typer.Option(help="Profile of the step times.")] = "a100-llama3.1-8b",
    seed: Annotated[int, typer.Option(help="Seed of the request sizes.")] = 0,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Measure decisions, gates and shadow policies on this machine."""
    if page_of is not None:
        write_page(page_of, page)
        return
    step_times = load_profile(profile)
    workload = make_workload("sharegpt", qps=1.0, requests=2048, seed=seed)
    rows: list[dict[str, Any]] = []
    for count in waiting or [1000, 10_000]:
        for name in policy or POLICIES:
            rows += decisions(name, step_times, workload, count, running, repeats)
    for gate in ("open", "credit", "slack"):
        rows += gate_steps(gate, step_times, workload, running, 10 * repeats)
    rows += shadow_cost(workload, 20 * repeats)
    if as_json:
        made_with = {"profile": profile, "seed": seed, "repeats": repeats}
        sys.stdout.write(results_json.dumps({"made_with": made_with, "costs": rows}))
    else:
        Console(width=max(Console().width, 112)).print(table(rows))


if __name__ == "__main__":
    typer.run(main)
