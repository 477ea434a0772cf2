"""Simulation of the gateway and its engines in virtual time, with the step times of a profile.

The simulation runs the production code of admission and policy (`gateway.scheduling.admission`), the step gate, the
rules of vLLM's scheduler (`engine_adapter.simulated.scheduler`) and the online step-time model. It differs in two
points: a step takes the time that the profile gives, and the network and the gateway take no time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from engine_adapter.simulated.scheduler import BLOCK_TOKENS
from engine_adapter.simulated.speculation import RandomAcceptance
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.profile import Profile
from gateway.policies.base import Policy
from gateway.requests.progress import tpot
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from lab.records.run_record import RequestResult
from lab.simulate.fleet import Fleet, ShardedFleet
from lab.simulate.lifecycle import ENGINE_LOST, Changes, Lifecycle
from lab.simulate.predictions import PredictedLength
from lab.simulate.replica import Replica
from lab.simulate.step_jitter import StepJitter
from lab.workload import WorkloadRequest


@dataclass(slots=True)
class SimulationResult:
    """Results and counters of one simulation. Times are seconds of virtual time, unless noted.

    Attributes:
        results: one per request, in the order of the workload.
        duration_s: time of the last event.
        scheduling_s: CPU seconds spent in policy decisions.
        routing_s: CPU seconds spent in choosing engines.
        decisions: number of policy decisions.
        steps: number of engine steps.
        busy_s: time that engines spent in steps, summed over engines.
        preemptions: number of preempted sequences.
        hit_rate, predicted_hit_rate: share of the prompt tokens sent to engines that the engines found in their prefix
            caches, and that the gateway predicted at admission; 0 without prompts.
        gpu_s: seconds that engines used GPUs, summed over engines.
        sizes: time (s) and number of engines, whenever it changed; empty without `Changes`.
    """

    results: list[RequestResult]
    duration_s: float
    scheduling_s: float
    routing_s: float
    decisions: int
    steps: int
    busy_s: float
    preemptions: int
    hit_rate: float
    predicted_hit_rate: float
    gpu_s: float
    sizes: list[tuple[float, int]]


def simulate(
    workload: Sequence[WorkloadRequest],
    predictions: Sequence[PredictedLength],
    profile: Profile | Sequence[Profile],
    make_policy: Callable[[], Policy],
    *,
    step_mode: str = "chunked",
    replicas: int = 1,
    routing: str = "least_load",
    gateways: int = 1,
    times: StepTimes | None = None,
    learn: bool = True,
    colocated_gateway: bool = False,
    best_effort: bool = False,
    tenants: Sequence[str] | None = None,
    step_jitter: StepJitter | None = None,
    prefix_caching: bool = True,
    prefix_index: bool = True,
    speculation: RandomAcceptance | None = None,
    changes: Changes | None = None,
    seed: int = 0,
    on_ended: Callable[[int], None] = lambda ended: None,
) -> SimulationResult:
    """Simulate ``workload``, which is sorted by arrival, until every request has ended.

    Args:
        workload: the requests, with true output lengths.
        predictions: predicted output lengths, one per request of ``workload``.
        profile: step times and limits of each engine; of several profiles, replica i gets the one at i modulo their
            number.
        make_policy: called once per replica.
        step_mode: one of `engine_adapter.simulated.scheduler.STEP_MODES`.
        replicas: number of engines.
        routing: how the router chooses among them, one of `gateway.scheduling.routing.ROUTINGS`.
        gateways: number of gateways that divide the engines. Each request goes to a random one.
        times: initial step times of the policies' step-time model; by default those of the profile.
        learn: whether the step-time model learns during the run.
        colocated_gateway: the gateway runs inside the engine and reacts to a step before the next one starts, as in
            SCORPIO's code. By default it runs in its own process, so the next step starts before it reacts.
        best_effort: whether all requests that cannot attain their SLO are served as best-effort requests. By default
            those with `WorkloadRequest.best_effort`.
        tenants: the tenant of each request; by default all requests belong to one tenant.
        step_jitter: random variation of the step times; none by default.
        prefix_caching: whether engines share the KV blocks of equal prefixes (`WorkloadRequest.blocks`).
        prefix_index: whether the gateway predicts prefix-cache hits. Without, it plans with whole prompts.
        speculation: speculative decoding in the engines; none by default.
        changes: failures, cold starts and autoscaling of the engines; none by default.
        seed: seed of ``step_jitter``, ``speculation`` and the gateway of each request.
        on_ended: called now and then with the number of requests that have ended.

    Raises:
        ValueError: a request that is longer than the context length of the profile, or more gateways than engines.
        RuntimeError: the policy leaves requests waiting forever while every engine is idle.
    """
    profiles = [profile] if isinstance(profile, Profile) else list(profile)
    _check_lengths(workload, min(profiles, key=lambda one: one.max_model_len))
    step_factors = [step_jitter.step_factors(seed * replicas + n) if step_jitter else None for n in range(replicas)]
    engines = [
        Replica(
            profiles[number % len(profiles)],
            make_policy(),
            step_mode=step_mode,
            times=times,
            learn=learn,
            step_factors=factors,
            best_effort=lambda request: best_effort or workload[int(request.id)].best_effort,
            prefix_caching=prefix_caching,
            prefix_index=prefix_index,
            speculation=replace(speculation, seed=seed * replicas + number) if speculation else None,
        )
        for number, factors in enumerate(step_factors)
    ]
    results = _Results(workload, on_ended)
    now, arrived, routing_s = 0.0, 0, 0.0
    fleet: Fleet | ShardedFleet | None = None
    if gateways > 1:
        fleet = ShardedFleet(engines, routing, lambda: now, gateways, len(workload), seed)
    elif len(engines) > 1:
        fleet = Fleet(engines, routing, lambda: now)
    events = _Events(engines)
    place = fleet.place if fleet is not None else lambda request: engines[0]
    lifecycle = Lifecycle(changes, engines, place) if changes is not None else None
    while results.open:
        engine = events.first()
        arrival_s = workload[arrived].at_s if arrived < len(workload) else math.inf
        touched = [engine]
        if lifecycle is not None and lifecycle.is_next(min(arrival_s, engine.next_event_s)):
            now = lifecycle.next_s
            touched, failed = lifecycle.apply(now)
            results.fail(failed)
            events = _Events(engines)
        elif arrival_s <= engine.next_event_s:
            if arrival_s == math.inf:
                raise RuntimeError(f"{results.open} requests wait, but every engine is idle and the policy admits none")
            now = arrival_s
            tenant = tenants[arrived] if tenants else "anonymous"
            request = _request(arrived, workload[arrived], predictions[arrived], tenant)
            if prefix_index:
                request.blocks, request.block_tokens = _prompt_blocks(workload[arrived]), BLOCK_TOKENS
            if fleet is not None:
                started = time.process_time()
                engine = fleet.place(request)
                routing_s += time.process_time() - started
            engine.admission.submit(request)
            arrived += 1
            touched = [engine]
        else:
            now = engine.next_event_s
            if engine.step is not None:
                results.finish(now, engine.end_step())
                if not colocated_gateway and engine.step is None:
                    engine.start_step(now)
        for engine in touched:
            _decide(engine, now, workload, results)
            events.changed(engine)
    prompt_tokens = max(1, sum(e.prefix_hits.prompt_tokens for e in engines))
    return SimulationResult(
        results=results.all(),
        duration_s=now,
        scheduling_s=sum(e.scheduling_s for e in engines),
        routing_s=routing_s,
        decisions=sum(e.decisions for e in engines),
        steps=sum(e.steps for e in engines),
        busy_s=sum(e.busy_s for e in engines),
        preemptions=sum(e.scheduler.preemptions for e in engines),
        hit_rate=sum(e.prefix_hits.cached_tokens for e in engines) / prompt_tokens,
        predicted_hit_rate=sum(e.prefix_hits.predicted_tokens for e in engines) / prompt_tokens,
        gpu_s=now * len(engines) if lifecycle is None else lifecycle.gpu_s(now),
        sizes=[] if lifecycle is None else lifecycle.sizes,
    )


def _check_lengths(workload: Sequence[WorkloadRequest], profile: Profile) -> None:
    longest = max((request.prompt_tokens + request.output_tokens for request in workload), default=0)
    if longest > profile.max_model_len:
        raise ValueError(
            f"the workload has a request of {longest} tokens, but the context length of profile {profile.name!r} is "
            f"{profile.max_model_len}: set --max-prompt and --max-output, or --max-model-len"
        )


def _decide(engine: Replica, now: float, workload: Sequence[WorkloadRequest], results: _Results) -> None:
    """Ask the policy of ``engine``, apply its decision, and start a step if none runs."""
    if engine.down:
        return
    decision = engine.decide(now)
    for request in decision.admit:
        sent = workload[int(request.id)]
        engine.send(request, sent.output_tokens, sent.blocks[:])
    for rejection in decision.reject:
        results.reject(rejection.request, f"{rejection.bound}_unattainable")
    if engine.step is None:
        engine.start_step(now)


class _Results:
    """Collects the result of each request of ``workload``."""

    def __init__(self, workload: Sequence[WorkloadRequest], on_ended: Callable[[int], None]) -> None:
        self.open = len(workload)
        self._workload = workload
        self._results: list[RequestResult | None] = [None] * len(workload)
        self._on_ended = on_ended

    def finish(self, now: float, requests: Sequence[Request]) -> None:
        """Record that ``requests`` got their last token at ``now``."""
        for request in requests:
            assert request.first_token_s is not None
            self._end(
                request,
                RequestResult(
                    self._workload[int(request.id)],
                    "finished",
                    ttft_s=request.first_token_s - request.arrival_s,
                    tpot_s=tpot(request.first_token_s, now, request.generated),
                    e2e_s=now - request.arrival_s,
                ),
            )

    def fail(self, requests: Sequence[Request]) -> None:
        """Record that the engine of ``requests`` died during their answers."""
        for request in requests:
            self._end(request, RequestResult(self._workload[int(request.id)], "failed", reason=ENGINE_LOST))

    def reject(self, request: Request, reason: str) -> None:
        """Record that the policy rejected ``request``."""
        self._end(request, RequestResult(self._workload[int(request.id)], "rejected", reason=reason))

    def _end(self, request: Request, result: RequestResult) -> None:
        assert self._results[int(request.id)] is None, "a request ended twice"
        self._results[int(request.id)] = result
        self.open -= 1
        if self.open % 64 == 0:
            self._on_ended(len(self._workload) - self.open)

    def all(self) -> list[RequestResult]:
        """Return the results in the order of the workload."""
        return [result for result in self._results if result is not None]


class _Events:
    """The next event of each engine, in a heap. Of equal times, the first engine's comes first."""

    def __init__(self, engines: Sequence[Replica]) -> None:
        self._engines = engines
        self._numbers = {engine: number for number, engine in enumerate(engines)}
        self._heap = [(engine.next_event_s, number) for number, engine in enumerate(engines)]
        heapify(self._heap)

    def first(self) -> Replica:
        """Return the engine with the first event."""
        heap, engines = self._heap, self._engines
        while True:
            at_s, number = heap[0]
            engine = engines[number]
            if engine.next_event_s == at_s:
                return engine
            heappop(heap)

    def changed(self, engine: Replica) -> None:
        """Note that the engine's next event may be another one."""
        heappush(self._heap, (engine.next_event_s, self._numbers[engine]))


def slo_of(request: WorkloadRequest) -> Slo:
    """Return the gateway's form of the bounds of ``request``: an infinite bound becomes None."""
    bounds = (request.ttft_slo_s, request.tpot_slo_s, request.e2e_slo_s)
    ttft_s, tpot_s, e2e_s = (bound if bound < math.inf else None for bound in bounds)
    return Slo(ttft_s, tpot_s, e2e_s)


def _prompt_blocks(request: WorkloadRequest) -> tuple[int, ...]:
    """Return the hashes of the whole blocks of the prompt."""
    return tuple(request.blocks[: request.prompt_tokens // BLOCK_TOKENS])


def _request(index: int, request: WorkloadRequest, predicted: PredictedLength, tenant: str) -> Request:
    return Request(
        id=str(index),
        slo_class=str(request.category),
        arrival_s=request.at_s,
        slo=slo_of(request),
        prompt_tokens=request.prompt_tokens,
        predicted_tokens=predicted.tokens,
        predicted_p90=predicted.p90,
        tenant=tenant,
    )
