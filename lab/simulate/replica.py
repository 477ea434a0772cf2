"""One engine of the simulator: the gateway's own admission, the rules of vLLM's scheduler, a profile's step times."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import cast

from engine_adapter.engine import EngineState, GateReport
from engine_adapter.gates.composite import GATES
from engine_adapter.gates.slack import SlackGate
from engine_adapter.simulated.scheduler import Finished, SimulatedScheduler, Step
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import Profile
from gateway.policies.base import UNGATED, Decision, Policy
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController
from lab.simulate.step_jitter import Speeds

_SHORTEST_STEP_S = 1e-4
"""A gate may leave a step empty; it still takes time, or virtual time would stand still."""

_RECHECK_AFTER_S = 1e-3
"""As the gateway's timer: a policy that wants to look again at once does so this much later."""


@dataclass(slots=True, eq=False)
class Flight(SimulatedSequence):
    """The sequence of an admitted request. ``request`` hears of tokens when they are out."""

    request: Request = field(kw_only=True)


class Replica:
    """An engine in virtual time. While it is idle, ``step`` is None and ``step_ends_s`` infinite.

    ``times``: what the policy is told of step times at first, by default the profile's; ``learn``: whether its
    step-time model then follows the steps it sees. ``speeds``: what its steps' times are multiplied by.
    ``best_effort``: whoever cannot attain its SLO is served all the same.
    """

    def __init__(
        self,
        profile: Profile,
        policy: Policy,
        *,
        step_mode: str = "chunked",
        times: StepTimes | None = None,
        learn: bool = True,
        speeds: Speeds | None = None,
        best_effort: bool = False,
    ) -> None:
        self.state = EngineState(
            alive=True,
            model=profile.name,
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_model_len=profile.max_model_len,
            kv_tokens=profile.kv_tokens,
            plans_ahead=profile.plans_ahead,
            gate=GateReport(preemptible=step_mode == "chunked" and GATES[policy.gate] is SlackGate),
            step_time=StepTimeModel(times=times or profile.step_times(), learn=learn),
        )
        self.admission = AdmissionController(policy, self.state, lambda request: best_effort)
        self.scheduler = SimulatedScheduler(
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_model_len=profile.max_model_len,
            kv_tokens=profile.kv_tokens,
            gate=GATES[policy.gate](),
            step_mode=step_mode,
        )
        self.step: Step | None = None
        self.step_ends_s = math.inf
        self.recheck_at_s = math.inf
        self.deciding_s = 0.0
        self.decisions = self.steps = 0
        self.busy_s = 0.0
        self._gated = policy.gate != UNGATED
        self._profile = profile
        self._speeds = speeds
        self._step_began_s = 0.0
        self._planned: Step | None = None
        self._outcome: Finished | None = None

    @property
    def next_event_s(self) -> float:
        """When something happens here next: a step ends, or the policy wants to look again.

        A busy engine's policy looks again when its step ends, also when a decision stands no more in mid-step; nothing
        that it decides takes effect earlier.
        """
        return self.recheck_at_s if self.step is None else self.step_ends_s

    def decide(self, now: float) -> Decision:
        """As the gateway does when there is news: let the policy decide, and hand what it admits to the engine."""
        decides = self.admission.decision_due(now)
        if decides or not self.admission.waiting:
            self.recheck_at_s = math.inf
        if not decides:
            return Decision()
        started = time.perf_counter()
        decision = self.admission.decide(now)
        self.deciding_s += time.perf_counter() - started
        self.decisions += 1
        if decision.recheck_at is not None:
            self.recheck_at_s = max(now + _RECHECK_AFTER_S, decision.recheck_at)
        return decision

    def send(self, request: Request, output_tokens: int) -> None:
        """An admitted ``request`` goes to the engine, which will generate ``output_tokens``."""
        sequence = Flight(
            request_id=request.id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=output_tokens,
            pace_s=request.pace_s if self._gated else None,
            kind=request.kind,
            request=request,
        )
        self.scheduler.submit(sequence)

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
        if self._speeds is not None:
            seconds *= self._speeds.next()
        self._step_began_s, self.step_ends_s = now, now + max(seconds, _SHORTEST_STEP_S)
        self.busy_s += self.step_ends_s - now
        self.steps += 1
        self.state.engine_running, self.state.engine_waiting = scheduler.running, scheduler.waiting
        self.state.kv_usage = scheduler.kv_usage
        if self._profile.plans_ahead:
            # What will come of this step is certain, so the next is decided on now; it is told when this one ends.
            self._outcome = scheduler.finish(step)
            self._planned = self._plan(now)

    def _plan(self, now: float) -> Step | None:
        return self.scheduler.plan(now) if self.scheduler.running or self.scheduler.waiting else None

    def end_step(self) -> list[Request]:
        """The step's tokens are out, and the requests hear of theirs; answers those that are done."""
        step, now = self.step, self.step_ends_s
        assert step is not None
        finished, self._outcome = self._outcome or self.scheduler.finish(step), None
        decodes = len(step.decodes)
        mean_context = step.decode_context / decodes if decodes else 0.0
        seconds = now - self._step_began_s
        self.state.step_time.observe(decodes, step.prefill_tokens, mean_context, seconds)
        self.scheduler.gate.observe(decodes, step.prefill_tokens, mean_context, seconds)
        self.step, self.step_ends_s = None, math.inf
        if self._planned is not None:
            # Decided on before anybody could react to this one's tokens.
            self.start_step(now)
        prefilled, done = cast(list[Flight], finished.prefilled), cast(list[Flight], finished.done)
        for flight in cast(list[Flight], step.decodes):
            flight.request.advance(1)
        for flight in prefilled:
            flight.request.advance(1)
            if flight.request.first_token_s is None:
                flight.request.first_token_s = now
                self.admission.capacity_changed()
        for flight in done:
            self.admission.leave(flight.request)
        return [flight.request for flight in done]
