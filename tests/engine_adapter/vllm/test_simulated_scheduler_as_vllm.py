"""The simulated scheduler plans the same steps as a reference of vLLM's algorithm, also when memory is short."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.base import OpenGate, StepPlan
from engine_adapter.simulated.scheduler import BLOCK_TOKENS, SimulatedScheduler
from engine_adapter.simulated.step import Step
from tests.fixtures.scheduler_workloads import ARRIVALS, LIMITS, Arrival, PseudoRandomGate, run_to_completion


@dataclass(eq=False)
class ReferenceRequest:
    """A request in the reference scheduler: its tokens, and how many of them are computed."""

    id: str
    tokens: int
    final_tokens: int
    prompt: int
    computed: int = 0
    blocks: int = 0

    @property
    def decodes(self) -> bool:
        """Whether one token is left to compute, behind the prompt (`engine_adapter.gates.phase`)."""
        return self.computed >= self.prompt and self.tokens - self.computed <= 1


class ReferenceScheduler:
    """`vllm.v1.core.sched.scheduler.Scheduler.schedule` of vLLM 0.32, reduced to text models.

    It has one running list in order of admission and no prefill or decode phase: a request's computed tokens catch up
    with its tokens. One difference: an admitted prompt allocates all of its blocks, while vLLM only checks that they
    are free.
    """

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, kv_tokens: int) -> None:
        self.seqs, self.budget, self.free = max_num_seqs, max_num_batched_tokens, -(-kv_tokens // BLOCK_TOKENS)
        self.running: list[ReferenceRequest] = []
        self.waiting: deque[ReferenceRequest] = deque()

    def schedule(self, sat_out: set[str], max_prefill_tokens: int | None) -> dict[str, int]:
        decoding = [r for r in self.running if r.decodes and r.id not in sat_out]
        budget = self.budget
        if max_prefill_tokens is not None:  # like `SloScheduler`, by the step's token budget
            budget = min(budget, len(decoding) + max_prefill_tokens)
        scheduled: dict[str, int] = {}
        at, preempted = 0, False
        while at < len(self.running) and budget > 0:
            request = self.running[at]
            at += 1
            if request.id in sat_out and request.decodes:
                continue
            new = min(request.tokens - request.computed, budget)
            more = max(0, -(-(request.computed + new) // BLOCK_TOKENS) - request.blocks)
            while self.free < more:
                victim = self.running.pop()
                self.free += victim.blocks
                victim.computed = victim.blocks = 0
                self.waiting.appendleft(victim)
                preempted = True
                if victim is request:
                    break
            if not request.blocks:
                break
            self.free -= more
            request.blocks += more
            scheduled[request.id] = new
            budget -= new
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.seqs:
            request = self.waiting[0]
            request.blocks = -(-request.tokens // BLOCK_TOKENS)
            if request.blocks > self.free:
                request.blocks = 0
                break
            self.free -= request.blocks
            self.running.append(self.waiting.popleft())
            scheduled[request.id] = min(request.tokens, budget)
            budget -= scheduled[request.id]
        return scheduled

    def update(self, scheduled: dict[str, int]) -> None:
        for request in self.running[:]:
            request.computed += scheduled.get(request.id, 0)
            if request.computed == request.tokens:
                request.tokens += 1
            if request.tokens == request.final_tokens:
                self.free += request.blocks
                self.running.remove(request)


def run_both(arrivals: list[Arrival], limits: dict[str, int], gate: Any) -> tuple[list[Any], list[Any]]:
    """Tokens per sequence in each step: of the simulated scheduler, and of the reference with the same gate plans."""
    simulated, expected = [], []
    reference = ReferenceScheduler(**limits)
    requests = [ReferenceRequest(str(i), a.prompt, a.prompt + a.output, a.prompt) for i, a in enumerate(arrivals)]
    plans: list[StepPlan] = []
    plan = gate.plan

    def recorded(*arguments: Any) -> StepPlan:
        plans.append(plan(*arguments))
        return plans[-1]

    gate.plan = recorded

    def step_reference(step: Step) -> None:
        simulated.append({s.request_id: 1 for s in step.decodes} | {s.request_id: tokens for s, tokens in step.chunks})
        for arrival, request in zip(arrivals, requests, strict=True):
            if arrival.step == len(expected):
                reference.waiting.append(request)
        expected.append(reference.schedule(step.sat_out, plans[-1].max_prefill_tokens))
        reference.update(expected[-1])

    run_to_completion(SimulatedScheduler(**limits, gate=gate), arrivals, step_reference)
    return simulated, expected


@given(ARRIVALS, LIMITS)
def test_chunked_steps_equal_vllms(arrivals: list[Arrival], limits: dict[str, int]) -> None:
    simulated, expected = run_both(arrivals, limits, OpenGate())
    assert simulated == expected


@given(ARRIVALS, LIMITS, st.integers(0, 2**16 - 1))
def test_gated_steps_equal_vllms(arrivals: list[Arrival], limits: dict[str, int], seed: int) -> None:
    simulated, expected = run_both(arrivals, limits, PseudoRandomGate(seed))
    assert simulated == expected
