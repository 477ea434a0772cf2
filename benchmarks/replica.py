"""One engine of the simulator: the gateway's own admission, the rules of vLLM's scheduler, a profile's step times."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from engine_adapter.profile import Profile
from engine_adapter.simulated_scheduler import Finished, SimulatedScheduler, Step
from engine_adapter.simulated_sequence import SimulatedSequence
from engine_adapter.step_gate import GATES
from engine_adapter.step_time import StepTimeModel
from gateway.admission import Admission
from gateway.policies.base import Decision, Policy
from gateway.request import Request

_SHORTEST_STEP_S = 1e-4
"""A gate may leave a step empty; it still takes time, or virtual time would stand still."""


@dataclass(slots=True, eq=False)
class Flight(SimulatedSequence):
    """The sequence of an admitted request."""

    request: Request | None = None


class Replica:
    """An engine in virtual time. While it is idle, ``step`` is None and ``step_ends_s`` infinite.

    ``learn``: whether the policy's step-time model follows the steps it sees or stays as the profile has it.
    """

    def __init__(self, profile: Profile, policy: Policy, *, step_mode: str = "chunked", learn: bool = True) -> None:
        self.state = EngineState(
            alive=True,
            model=profile.name,
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_model_len=profile.max_model_len,
            kv_tokens=profile.kv_tokens,
            step_time=StepTimeModel(times=profile.step_times(), learn=learn),
        )
        self.admission = Admission(policy, self.state)
        self.scheduler = SimulatedScheduler(
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_model_len=profile.max_model_len,
            kv_tokens=profile.kv_tokens,
            gate=GATES["credit" if policy.gated else "open"](),
            step_mode=step_mode,
        )
        self.step: Step | None = None
        self.step_ends_s = math.inf
        self.recheck_at_s = math.inf
        self.deciding_s = 0.0
        self.decisions = self.steps = 0
        self.busy_s = 0.0
        self._gated = policy.gated
        self._profile = profile
        self._flights: dict[str, Flight] = {}
        self._planned: Step | None = None
        self._outcome = Finished([], [])

    @property
    def next_event_s(self) -> float:
        """When something happens here next: a step ends, or the policy wants to look again.

        A busy engine's policy looks again when its step ends; nothing that it decides takes effect earlier.
        """
        return self.recheck_at_s if self.step is None else self.step_ends_s

    def decide(self, now: float) -> Decision:
        """As the gateway does on every event: let the policy decide, and hand what it admits to the engine."""
        self.recheck_at_s = math.inf
        if not self.admission.waiting:
            return Decision()
        for sequence in self.scheduler.decoding:
            request = self._flights[sequence.request_id].request
            assert request is not None
            request.generated = sequence.length - sequence.prompt_tokens
        started = time.perf_counter()
        decision = self.admission.decide(now)
        self.deciding_s += time.perf_counter() - started
        self.decisions += 1
        if decision.recheck_at is not None:
            self.recheck_at_s = max(now, decision.recheck_at)
        return decision

    def send(self, request: Request, output_tokens: int) -> None:
        """An admitted ``request`` goes to the engine, which will generate ``output_tokens``."""
        flight = Flight(
            request_id=request.id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=output_tokens,
            tpot_slo_s=request.tpot_slo_s if self._gated else None,
            request=request,
        )
        self._flights[request.id] = flight
        self.scheduler.submit(flight)

    def start_step(self, now: float) -> None:
        """Begin the next step, if there is anything to do."""
        scheduler = self.scheduler
        step, self._planned = self._planned or self._plan(now), None
        if step is None:
            return
        self.step = step
        seconds = self._profile.step_seconds(
            len(step.decodes), step.decode_context, step.prefill_tokens, step.prefill_context, len(step.chunks) or 1
        )
        self.step_ends_s = now + max(seconds, _SHORTEST_STEP_S)
        self.busy_s += self.step_ends_s - now
        self.steps += 1
        self.state.engine_running, self.state.engine_waiting = scheduler.running, scheduler.waiting
        self.state.kv_usage = scheduler.kv_usage
        decodes = len(step.decodes)
        mean_context = step.decode_context / decodes if decodes else 0.0
        # What comes of the step is certain now, and told when it ends. Nobody looks before that.
        self.state.step_time.observe(decodes, step.prefill_tokens, mean_context, self.step_ends_s - now)
        self._outcome = scheduler.finish(step)
        if self._profile.plans_ahead:
            self._planned = self._plan(now)

    def _plan(self, now: float) -> Step | None:
        return self.scheduler.plan(now) if self.scheduler.running or self.scheduler.waiting else None

    def end_step(self) -> tuple[list[Request], list[Request]]:
        """The step's tokens are out: the requests that have their first token by it, and those that are done."""
        now, finished = self.step_ends_s, self._outcome
        self.step, self.step_ends_s = None, math.inf
        if self._planned is not None:
            # The next step was decided on before anybody could react to this one.
            self.start_step(now)
        first = []
        for sequence in finished.prefilled:
            request = self._flights[sequence.request_id].request
            assert request is not None
            if request.first_token_s is None:
                request.first_token_s = now
                first.append(request)
        return first, [self._land(sequence.request_id) for sequence in finished.done]

    def _land(self, request_id: str) -> Request:
        flight = self._flights.pop(request_id)
        assert flight.request is not None
        flight.request.generated = flight.generated
        self.admission.leave(flight.request)
        return flight.request
