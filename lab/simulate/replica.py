"""One simulated engine: the gateway's admission, the rules of vLLM's scheduler, and the step times of a profile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from engine_adapter.engine import EngineState
from engine_adapter.gates.composite import GATES
from engine_adapter.gates.slack import SlackGate
from engine_adapter.simulated.scheduler import SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.simulated.speculation import Speculation
from engine_adapter.simulated.step import Finished, Step
from engine_adapter.step_report import GateReport
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import Profile
from gateway.policies.base import UNGATED, Decision, Policy
from gateway.requests.prefix_index import PrefixIndex
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController
from lab.simulate.step_jitter import StepFactors

_SHORTEST_STEP_S = 1e-4
"""Minimum step time (s). A step that the gate leaves empty must take time, or virtual time would not advance."""

_RECHECK_AFTER_S = 1e-3
"""Minimum delay (s) before a recheck that a policy asks for, as in the gateway's timer."""


@dataclass(slots=True, eq=False)
class ReplicaSequence(SimulatedSequence):
    """The sequence of an admitted request. ``request`` is updated when the step that produces a token ends."""

    request: Request = field(kw_only=True)


@dataclass(slots=True)
class PrefixHits:
    """Tokens of all prompts that an engine started: in total, and predicted and found in its prefix cache."""

    prompt_tokens: int = 0
    predicted_tokens: int = 0
    cached_tokens: int = 0


class Replica:
    """An engine in virtual time. While it is idle, ``step`` is None and ``step_ends_s`` is infinite.

    Args:
        profile: step times and limits.
        policy: the admission policy in front of this engine.
        step_mode: one of `engine_adapter.simulated.scheduler.STEP_MODES`.
        times: initial step times of the step-time model; by default those of the profile.
        learn: whether the step-time model learns from the steps of the run.
        step_factors: factors on the times of successive steps.
        best_effort: whether a request that cannot attain its SLO is served as a best-effort request.
        prefix_caching: whether the engine shares the KV blocks of equal prefixes.
        prefix_index: whether the gateway predicts the hits and learns from them. Without, it plans with whole prompts.
        speculation: speculative decoding; none by default.
    """

    def __init__(
        self,
        profile: Profile,
        policy: Policy,
        *,
        step_mode: str = "chunked",
        times: StepTimes | None = None,
        learn: bool = True,
        step_factors: StepFactors | None = None,
        best_effort: Callable[[Request], bool] = lambda request: False,
        prefix_caching: bool = True,
        prefix_index: bool = True,
        speculation: Speculation | None = None,
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
        self.admission = AdmissionController(policy, self.state, best_effort, PrefixIndex(profile.kv_tokens))
        self._new_scheduler: Callable[[], SimulatedScheduler] = lambda: SimulatedScheduler(
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_model_len=profile.max_model_len,
            kv_tokens=profile.kv_tokens,
            gate=GATES[policy.gate](),
            step_mode=step_mode,
            prefix_caching=prefix_caching,
            speculation=speculation,
        )
        self.scheduler = self._new_scheduler()
        self.down = False
        """Whether the engine does nothing at all: it has not started yet, or it has stopped."""
        self.prefix_hits = PrefixHits()
        self.step: Step | None = None
        self.step_ends_s = math.inf
        self.recheck_at_s = math.inf
        self.scheduling_s = 0.0
        self.decisions = self.steps = 0
        self.busy_s = 0.0
        self._prefix_index = prefix_index
        self._speculation = speculation
        self._gated = policy.gate != UNGATED
        self._profile = profile
        self._step_factors = step_factors
        self._step_started_s = 0.0
        self._planned: Step | None = None
        self._outcome: Finished | None = None

    @property
    def next_event_s(self) -> float:
        """Virtual time (s) of the next event: a step ends, or the policy asked for a recheck.

        While the engine is busy, a recheck waits for the end of the step, because no decision takes effect earlier.
        """
        if self.down:
            return math.inf
        return self.recheck_at_s if self.step is None else self.step_ends_s

    def decide(self, now: float) -> Decision:
        """Run the policy at ``now``, if a decision is due, and return its decision."""
        due = self.admission.decision_due(now)
        if due or not self.admission.waiting:
            self.recheck_at_s = math.inf
        if not due:
            return Decision()
        started = time.process_time()
        decision = self.admission.decide(now)
        self.scheduling_s += time.process_time() - started
        self.decisions += 1
        if decision.recheck_at is not None:
            self.recheck_at_s = max(now + _RECHECK_AFTER_S, decision.recheck_at)
        return decision

    def take_waiting(self) -> list[Request]:
        """Remove and return the requests that wait for admission."""
        waiting = list(self.admission.waiting)
        for request in waiting:
            self.admission.withdraw(request)
        return waiting

    def lose_requests(self) -> tuple[list[Request], list[Request]]:
        """Remove all requests, because the engine dies: those whose answer has begun, and the others."""
        running = list(self.admission.running.values())
        for request in running:
            self.admission.leave(request)
        begun = [request for request in running if request.first_token_s is not None]
        return begun, [request for request in running if request.first_token_s is None] + self.take_waiting()

    def restart(self) -> None:
        """Forget the KV memory, the steps and what the gateway knows of them. The engine has no requests."""
        self.scheduler = self._new_scheduler()
        self.admission.prefixes.clear()
        self.step = self._planned = self._outcome = None
        self.step_ends_s = self.recheck_at_s = math.inf

    def send(self, request: Request, output_tokens: int, blocks: Sequence[int] = ()) -> None:
        """Send an admitted ``request`` to the engine, which generates ``output_tokens`` for it.

        ``blocks``: hashes of the blocks of the prompt and the answer, for the engine's prefix cache.
        """
        sequence = ReplicaSequence(
            request_id=request.id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=output_tokens,
            pace_s=request.pace_s if self._gated else None,
            kind=request.kind,
            blocks=blocks,
            on_cached=partial(self._on_cached, request),
            request=request,
        )
        self.scheduler.submit(sequence)

    def _on_cached(self, request: Request, tokens: int) -> None:
        """Record the prefix-cache hit of ``request``, and report it to the gateway."""
        hits, predicted = self.prefix_hits, request.cached_tokens
        hits.prompt_tokens += request.prompt_tokens
        hits.predicted_tokens += predicted
        hits.cached_tokens += tokens
        if self._prefix_index:
            self.admission.prefixes.learn(request, predicted, tokens)
            request.cached_tokens = tokens

    def start_step(self, now: float) -> None:
        """Start the next step, unless the engine has no sequences."""
        scheduler = self.scheduler
        step, self._planned = self._planned or self._plan(now), None
        if step is None:
            return
        self.step = step
        seconds = self._profile.step_seconds(
            len(step.decodes) + step.draft_tokens + step.padding_tokens,
            step.decode_context,
            step.prefill_tokens,
            step.prefill_context,
            len(step.chunks) or 1,
        )
        if self._speculation is not None and step.drafts:
            seconds += self._speculation.draft_s
        if self._step_factors is not None:
            seconds *= self._step_factors.next()
        self._step_started_s, self.step_ends_s = now, now + max(seconds, _SHORTEST_STEP_S)
        self.busy_s += self.step_ends_s - now
        self.steps += 1
        self.state.engine_running, self.state.engine_waiting = scheduler.running, scheduler.waiting
        self.state.kv_usage = scheduler.kv_usage
        if self._profile.plans_ahead:
            # Asynchronous scheduling: the outcome of this step is known, so the engine plans the next one now. Requests
            # and policy see the outcome when this step ends.
            self._outcome = scheduler.finish(step)
            self._planned = self._plan(now)

    def _plan(self, now: float) -> Step | None:
        return self.scheduler.plan(now) if self.scheduler.running or self.scheduler.waiting else None

    def end_step(self) -> list[Request]:
        """End the step: update the requests that got a token, and return the finished ones."""
        step, now = self.step, self.step_ends_s
        assert step is not None
        finished, self._outcome = self._outcome or self.scheduler.finish(step), None
        report = step.report(now - self._step_started_s)
        self.state.observe_step(report)
        self.scheduler.gate.observe(report)
        self.step, self.step_ends_s = None, math.inf
        if self._planned is not None:
            # The engine planned this step before the gateway could react to the tokens of the last one.
            self.start_step(now)
        prefilled, done = cast(list[ReplicaSequence], finished.prefilled), cast(list[ReplicaSequence], finished.done)
        for sequence, tokens in cast(Iterator[tuple[ReplicaSequence, int]], step.tokens()):
            sequence.request.advance(tokens)
        for sequence in prefilled:
            sequence.request.advance(1)
            if sequence.request.first_token_s is None:
                sequence.request.first_token_s = now
                self.admission.on_first_token(sequence.request)
        for sequence in done:
            self.admission.leave(sequence.request)
        return [sequence.request for sequence in done]
