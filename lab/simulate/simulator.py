"""The gateway and its engines in virtual time: the very policies and step gates, on the step times of a profile.

What is real: `gateway.scheduling.admission` with the policy, the step gate, the rules of vLLM's scheduler
(`engine_adapter.simulated.scheduler`), and the step-time model learning from the steps it sees. What is not: a step
takes what the profile says, and the network and the gateway take no time, but enough to come after the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.profile import Profile
from gateway.policies.base import Policy
from gateway.requests.progress import tpot
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from gateway.scheduling.placement import load
from lab.records.run_record import RequestResult
from lab.simulate.predictions import Predicted
from lab.simulate.replica import Replica
from lab.simulate.step_jitter import StepJitter
from lab.workload import WorkloadRequest


@dataclass(slots=True)
class Simulated:
    """What came of a workload: each request's fate, in its order; times in seconds of virtual time.

    ``scheduling_s`` is real time: what all decisions took. ``busy_s``: virtual time that engines spent in steps.
    """

    served: list[RequestResult]
    duration_s: float
    scheduling_s: float
    decisions: int
    steps: int
    busy_s: float
    preemptions: int


def simulate(
    workload: Sequence[WorkloadRequest],
    predictions: Sequence[Predicted],
    profile: Profile,
    make_policy: Callable[[], Policy],
    *,
    step_mode: str = "chunked",
    replicas: int = 1,
    times: StepTimes | None = None,
    learn: bool = True,
    apart: bool = True,
    best_effort: bool = False,
    tenants: Sequence[str] | None = None,
    step_jitter: StepJitter | None = None,
    seed: int = 0,
    on_ended: Callable[[int], None] = lambda ended: None,
) -> Simulated:
    """Play ``workload`` (sorted by time) to its last answer.

    Args:
        predictions: the output length that the gateway is told, one for each request of ``workload``.
        make_policy: called once for each replica.
        step_mode: one of `simulated_scheduler.STEP_MODES`.
        replicas: engines; a request goes to the one with the least work ahead of it.
        times: what policies are told of step times at first; by default the profile's own.
        learn: whether they learn step times in the run, or keep those throughout.
        apart: the gateway is a process of its own, so that the next step has begun before it reacts to the last one.
            False puts it inside the engine, as SCORPIO's authors had it.
        unsteady: how much the engines' steps vary, as ``seed`` has it; by default they take what the profile says.
        best_effort: whether who cannot attain its SLO is served all the same.
        tenants: whose each request of ``workload`` is; by default all are the same one's.
        on_ended: told, now and then, how many requests have ended.

    Raises:
        ValueError: a request that no engine of this profile can hold.
        RuntimeError: a policy that leaves requests waiting for ever before an idle engine.
    """
    longest = max((a.prompt_tokens + a.output_tokens for a in workload), default=0)
    if longest > profile.max_model_len:
        raise ValueError(
            f"the workload has a request of {longest} tokens, but an engine of the profile {profile.name!r} holds "
            f"{profile.max_model_len}: limit it with --max-prompt and --max-output"
        )
    speeds = [step_jitter.speeds(seed * replicas + n) if step_jitter else None for n in range(replicas)]
    engines = [
        Replica(
            profile,
            make_policy(),
            step_mode=step_mode,
            times=times,
            learn=learn,
            speeds=each,
            best_effort=best_effort,
        )
        for each in speeds
    ]
    fates = _Fates(workload, on_ended)
    now, arrived = 0.0, 0
    while fates.open:
        engine = min(engines, key=_next_event_s) if len(engines) > 1 else engines[0]
        due_s = workload[arrived].at_s if arrived < len(workload) else math.inf
        if due_s <= engine.next_event_s:
            if due_s == math.inf:
                raise RuntimeError(f"{fates.open} requests wait before idle engines, and the policy will not decide")
            now = due_s
            if len(engines) > 1:
                engine = min(engines, key=_load)
            tenant = tenants[arrived] if tenants else "anonymous"
            engine.admission.submit(_request(arrived, workload[arrived], predictions[arrived], tenant))
            arrived += 1
        else:
            now = engine.next_event_s
            if engine.step is not None:
                fates.finished(now, engine.end_step())
                if apart and engine.step is None:
                    engine.start_step(now)
        decision = engine.decide(now)
        for request in decision.admit:
            engine.send(request, workload[int(request.id)].output_tokens)
        for rejection in decision.reject:
            fates.rejected(rejection.request, f"{rejection.bound}_unattainable")
        if engine.step is None:
            engine.start_step(now)
    return Simulated(
        served=fates.served(),
        duration_s=now,
        scheduling_s=sum(e.deciding_s for e in engines),
        decisions=sum(e.decisions for e in engines),
        steps=sum(e.steps for e in engines),
        busy_s=sum(e.busy_s for e in engines),
        preemptions=sum(e.scheduler.preemptions for e in engines),
    )


class _Fates:
    """How each request of a workload ended."""

    def __init__(self, workload: Sequence[WorkloadRequest], on_ended: Callable[[int], None]) -> None:
        self.open = len(workload)
        self._workload = workload
        self._served: list[RequestResult | None] = [None] * len(workload)
        self._on_ended = on_ended

    def finished(self, now: float, requests: Sequence[Request]) -> None:
        """These had their last token at ``now``."""
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

    def rejected(self, request: Request, reason: str) -> None:
        """It was turned away."""
        self._end(request, RequestResult(self._workload[int(request.id)], "rejected", reason=reason))

    def _end(self, request: Request, served: RequestResult) -> None:
        assert self._served[int(request.id)] is None, "a request ended twice"
        self._served[int(request.id)] = served
        self.open -= 1
        if self.open % 64 == 0:
            self._on_ended(len(self._workload) - self.open)

    def served(self) -> list[RequestResult]:
        """All of them, in the workload's order."""
        return [served for served in self._served if served is not None]


def _next_event_s(engine: Replica) -> float:
    return engine.next_event_s


def _load(engine: Replica) -> tuple[float, int]:
    return load(engine.admission)


def asked_slo(asked: WorkloadRequest) -> Slo:
    """The bounds as a gateway has them: one that is infinite is none."""
    bounds = (asked.ttft_slo_s, asked.tpot_slo_s, asked.e2e_slo_s)
    return Slo(*(bound if bound < math.inf else None for bound in bounds))


def _request(index: int, asked: WorkloadRequest, predicted: Predicted, tenant: str) -> Request:
    return Request(
        id=str(index),
        slo_class=str(asked.category),
        arrival_s=asked.at_s,
        slo=asked_slo(asked),
        prompt_tokens=asked.prompt_tokens,
        predicted_tokens=predicted.tokens,
        predicted_p90=predicted.p90,
        tenant=tenant,
    )
