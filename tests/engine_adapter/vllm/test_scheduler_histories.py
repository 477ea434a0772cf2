"""Random histories of vLLM's own scheduler with the step gate, speculation, prefix caching, grammars and preemption."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from engine_adapter.gates.base import Decoding, StepPlan

if TYPE_CHECKING:
    from tests.fixtures.vllm_stepping import SteppedScheduler

# vLLM is imported, which takes seconds and much memory; no engine is started.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Make = Callable[..., "SteppedScheduler"]

HISTORIES, STEPS, ARRIVALS = 100, 80, 60
"""Histories in all, the steps of one, and the steps in which requests arrive."""


class CheckedSteps:
    """Steps ``engine`` and checks that each step does what its gate planned, within its budget, and is reported so."""

    def __init__(self, engine: SteppedScheduler, budget: int) -> None:
        self._engine, self._budget = engine, budget
        self._planned: tuple[Sequence[Decoding], StepPlan] | None = None
        self.seen = {"drafts": 0, "dropped": 0, "recomputed": 0, "sat_out": 0, "capped": 0}
        self.scheduled = 0
        plan = engine.scheduler._gate.plan

        def recorded(now: float, decoding: Sequence[Decoding], *rest: Any) -> StepPlan:
            made = plan(now, decoding, *rest)
            self._planned = list(decoding), made
            return made

        engine.scheduler._gate.plan = recorded  # type: ignore[method-assign]

    def step(self) -> None:
        self._planned = None
        engine, scheduler = self._engine, self._engine.scheduler
        before = {request.request_id for request in scheduler.running}
        scheduled = engine.step()
        total = sum(scheduled.values())
        self.scheduled += total
        assert total <= self._budget
        if total:
            planned = scheduler._in_flight[-1].planned if engine.overlap else engine.steps[-1]
            assert planned.decode_requests + planned.draft_tokens + planned.prefill_tokens == total
            assert planned.recomputed_tokens <= planned.prefill_tokens
            assert planned.drafting_requests <= planned.decode_requests
            self.seen["drafts"] += planned.draft_tokens
            self.seen["recomputed"] += planned.recomputed_tokens
            if self._planned is not None and self._planned[1].max_prefill_tokens is not None:
                self.seen["capped"] += 1
                # A step computes at least one token, or a prompt's only token with vLLM's padding. Padding is no
                # prefill, but vLLM counts it like that.
                least = 1 + scheduler.num_spec_tokens
                assert planned.prefill_tokens <= max(least, self._planned[1].max_prefill_tokens)
        if self._planned is not None:
            decoding, plan = self._planned
            self.seen["dropped"] += len(plan.drafts)
            self.seen["sat_out"] += len(plan.sit_out)
            running = {request.request_id for request in scheduler.running} & before
            for request in decoding:
                name = request.request_id
                if name in plan.sit_out:
                    assert name not in scheduled
                elif name in running:
                    assert name in scheduled, "a decode starves"
                    assert scheduled[name] <= 1 + plan.drafts.get(name, self._budget)


def history(make: Make, seed: int) -> dict[str, int]:
    """Run one history, and return what happened in it."""
    from tests.fixtures.vllm_stepping import output_token

    rng = random.Random(seed)
    drafts, budget, overlap = rng.choice([0, 1, 3, 5]), rng.choice([32, 64, 300]), rng.random() < 0.7
    engine = make(
        seqs=rng.choice([2, 8, 24, 24]),
        blocks=rng.choice([40, 80, 200]),
        budget=budget,
        overlap=overlap,
        caching=rng.random() < 0.5,
        drafts=drafts,
        accept=lambda name, length, offered: rng.randint(0, offered),
        keeps_drafts=overlap and rng.random() < 0.5,
        long_prefill=rng.choice([0, 0, 20]),
        window=rng.choice([0, 0, 40]),
    )
    steps = CheckedSteps(engine, budget)
    requests, aborted = {}, set()
    shared = [rng.randint(10, 60) for _ in range(100)]
    gates = rng.choice([["slack"], ["credit"], ["slack", "slack", "credit", "open"]])
    long_share = rng.choice([0.0, 0.5, 1.0])
    for step in range(STEPS):
        if step < ARRIVALS and rng.random() < 0.7:
            name, kind = f"r{step}", rng.choice([None, None, None, "deadline_only", "best_effort", "yielding"])
            prompt = [rng.randint(10, 60) for _ in range(rng.randint(1, 12))]
            if rng.random() < long_share:
                prompt = shared[: rng.randint(0, 80)] + prompt * 6
            tpot_ms = rng.choice([None, None, 30, 50, 500])
            structured = rng.random() < 0.3
            requests[name] = engine.add(
                name, prompt, rng.randint(1, 90), tpot_ms, rng.choice(gates), kind, structured=structured
            )
        if rng.random() < 0.05 and engine.scheduler.requests:
            name = rng.choice(sorted(engine.scheduler.requests))
            engine.abort(name)
            aborted.add(name)
        steps.step()
    engine.drain()
    for name, request in requests.items():
        output = list(request.output_token_ids)
        assert output == [output_token(number) for number in range(len(output))], "a token is lost or doubled"
        if name not in aborted:
            assert engine.generated[name] == len(output) == request.max_tokens
    reported = engine.steps
    assert sum(s.accepted_tokens for s in reported) == engine.accepted
    assert sum(s.decode_requests + s.draft_tokens + s.prefill_tokens for s in reported) == engine.computed
    return steps.seen


@pytest.mark.parametrize("part", range(4))
def test_histories_keep_tokens_memory_budgets_and_reports(make: Make, part: int) -> None:
    seen: dict[str, int] = {}
    for seed in range(part, HISTORIES, 4):
        for what, count in history(make, seed).items():
            seen[what] = seen.get(what, 0) + count
    assert all(seen.values()), seen
