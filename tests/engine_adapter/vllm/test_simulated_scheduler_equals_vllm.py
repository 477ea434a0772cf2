"""The simulated engine's scheduler makes the same decisions as vLLM's, step by step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.fixtures.scheduler_play import COMERS, LIMITS, Comes, WhimsicalGate, play

from engine_adapter.gates.base import OpenGate, StepPlan
from engine_adapter.simulated.scheduler import BLOCK_TOKENS, SimulatedScheduler, Step


@dataclass(eq=False)
class Row:
    """A request in the reference scheduler: its tokens, and how many of them are computed."""

    id: str
    tokens: int
    final: int
    prompt: int
    computed: int = 0
    blocks: int = 0


class Reference:
    """`vllm.v1.core.sched.scheduler.Scheduler.schedule` of vLLM 0.32, reduced to text models.

    It has one running list in order of admission and no prefill or decode phase: a request's computed tokens catch up
    with its tokens. One difference: an admitted prompt allocates all of its blocks, while vLLM only checks that they
    are free.
    """

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, kv_tokens: int) -> None:
        self.seqs, self.budget, self.free = max_num_seqs, max_num_batched_tokens, -(-kv_tokens // BLOCK_TOKENS)
        self.running: list[Row] = []
        self.waiting: deque[Row] = deque()

    def schedule(self, held_back: set[str], most_prompt_tokens: int | None) -> dict[str, int]:
        decoding = [r for r in self.running if r.computed >= r.prompt and r.id not in held_back]
        budget = self.budget
        if most_prompt_tokens is not None:  # as in SloScheduler, through the step's token budget
            budget = min(budget, len(decoding) + most_prompt_tokens)
        scheduled: dict[str, int] = {}
        at, preempted = 0, False
        while at < len(self.running) and budget > 0:
            row = self.running[at]
            at += 1
            if row.id in held_back and row.computed >= row.prompt:
                continue
            new = min(row.tokens - row.computed, budget)
            more = max(0, -(-(row.computed + new) // BLOCK_TOKENS) - row.blocks)
            while self.free < more:
                victim = self.running.pop()
                self.free += victim.blocks
                victim.computed = victim.blocks = 0
                victim.prompt = victim.tokens
                self.waiting.appendleft(victim)
                preempted = True
                if victim is row:
                    break
            if not row.blocks:
                break
            self.free -= more
            row.blocks += more
            scheduled[row.id] = new
            budget -= new
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.seqs:
            row = self.waiting[0]
            row.blocks = -(-row.tokens // BLOCK_TOKENS)
            if row.blocks > self.free:
                row.blocks = 0
                break
            self.free -= row.blocks
            self.running.append(self.waiting.popleft())
            scheduled[row.id] = min(row.tokens, budget)
            budget -= scheduled[row.id]
        return scheduled

    def update(self, scheduled: dict[str, int]) -> None:
        for row in self.running[:]:
            row.computed += scheduled.get(row.id, 0)
            if row.computed == row.tokens:
                row.tokens += 1
            if row.tokens == row.final:
                self.free += row.blocks
                self.running.remove(row)


def side_by_side(comers: list[Comes], limits: dict[str, int], gate: Any) -> tuple[list[Any], list[Any]]:
    """Tokens per sequence of each step: of our scheduler, and of the reference with our gate's decisions."""
    ours, theirs = [], []
    reference = Reference(**limits)
    arrivals = {id(c): Row(str(i), c.prompt, c.prompt + c.output, c.prompt) for i, c in enumerate(comers)}
    caps: list[int | None] = []
    plan = gate.plan

    def recorded(*seen: Any) -> StepPlan:
        caps.append((planned := plan(*seen)).max_prefill_tokens)
        return planned

    gate.plan = recorded

    def look(step: Step) -> None:
        ours.append({s.request_id: 1 for s in step.decodes} | {s.request_id: tokens for s, tokens in step.chunks})
        for comes in comers:
            if comes.step == len(theirs):
                reference.waiting.append(arrivals[id(comes)])
        theirs.append(reference.schedule(step.sat_out, caps[-1]))
        reference.update(theirs[-1])

    play(SimulatedScheduler(**limits, gate=gate), comers, look)
    return ours, theirs


@given(COMERS, LIMITS)
def test_chunked_steps_are_vllms(comers: list[Comes], limits: dict[str, int]) -> None:
    ours, theirs = side_by_side(comers, limits, OpenGate())
    assert ours == theirs


@given(COMERS, LIMITS, st.integers(0, 2**16 - 1))
def test_gated_steps_are_those_of_vllm_with_our_scheduler_class(
    comers: list[Comes], limits: dict[str, int], whim: int
) -> None:
    ours, theirs = side_by_side(comers, limits, WhimsicalGate(whim))
    assert ours == theirs
