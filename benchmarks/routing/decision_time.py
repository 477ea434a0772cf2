"""Measures the CPU time of choosing an engine, by routing policy and number of engines: the mean, and the slowest.

    python -m benchmarks.routing.decision_time

Every engine runs 100 requests of two paces. The requests that are placed wait there, and for each one another request
ends, as at a steady load. Noting that end is part of the time. A second of that load is measured, so the sums over the
requests of each engine are made again several times.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.markdown import table
from engine_adapter.model_card import ModelCard
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import load_profile
from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.router import Router
from gateway.scheduling.routing import ROUTINGS, make_routing

PROFILE = "a100-llama3.1-8b"
RUNNING = 100
"""Requests that run on each engine."""

WARM_UP = 50
"""Placements before the first measured one, besides one for each engine."""

RATE, SPAN_S = 25.0, 1.0
"""Requests per second and engine, and seconds of that load: they decide how often estimates are refreshed."""


def _request(name: str, number: int, at_s: float) -> Request:
    pace_s = (0.03, 0.05)[number % 2]
    return Request(name, "chat", at_s, Slo(2.0, pace_s), prompt_tokens=300, predicted_tokens=200)


def measure(routing: str, engines: int) -> tuple[float, float]:
    """Return the CPU time (us) of placing a request on one of ``engines`` engines, and of noting another's end.

    It is the mean, and that of the slowest one.
    """
    now, times = 0.0, load_profile(PROFILE).step_times()
    queues = []
    for number in range(engines):
        engine = SimulatedEngine(name=str(number))
        engine.state.alive, engine.state.step_time = True, StepTimeModel(times=times)
        engine.state.set_models([ModelCard("model")])
        queue = EngineQueue(engine, make_policy("slack"), {"chat": SloClass("chat", Slo())}, clock=lambda: now)
        for running in range(RUNNING):
            request = _request(f"{number}-{running}", running, now)
            request.admitted_s = request.first_token_s = now
            queue.running[request.id] = request
        queues.append(queue)
    router = Router(queues, make_routing(routing), lambda: now)
    for queue in queues:
        for request in queue.running.values():
            router.on_sent(queue, request)
    seconds, warm_up = list[float](), WARM_UP + engines
    for number in range(warm_up + round(SPAN_S * RATE * engines)):
        now += 1 / (RATE * engines)
        request = _request(f"new-{number}", number, now)
        ended = queues[number % engines]
        oldest = next(iter(ended.running.values()), None)
        started = time.process_time()
        if oldest is not None:
            ended.admission.leave(oldest)
        queue = router.place(request)
        router.on_sent(queue, request)
        if number >= warm_up:
            seconds.append(time.process_time() - started)
        queue.admission.submit(request)
    return round(1e6 * fmean(seconds), 1), round(1e6 * max(seconds), 1)


def main(
    engines: Annotated[
        list[int] | None, typer.Option(help="Number of engines; repeatable. [default: 4, 8, 64, 256]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Measure the CPU time of choosing an engine (us)."""
    counts = engines or [4, 8, 64, 256]
    found = {name: {str(count): measure(name, count) for count in counts} for name in ROUTINGS}
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        rows = [
            [f"`{name}`", *(f"{mean_us:,.0f} ({slowest_us:,.0f})" for mean_us, slowest_us in by_count.values())]
            for name, by_count in found.items()
        ]
        Console().print(table(["routing", *(f"{count} engines" for count in counts)], rows))


if __name__ == "__main__":
    typer.run(main)
