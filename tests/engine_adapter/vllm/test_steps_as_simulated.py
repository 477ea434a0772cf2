"""The simulated scheduler plans the same steps as vLLM's own, which runs with the step gate but without a model."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from engine_adapter.gates import composite
from engine_adapter.service_kind import ServiceKind, default_kind
from engine_adapter.simulated.prompt import block_hashes
from engine_adapter.simulated.scheduler import SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.simulated.step import Step

if TYPE_CHECKING:
    from tests.fixtures.vllm_stepping import SteppedScheduler

# vLLM is imported, which takes seconds and much memory; no engine is started.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Make = Callable[..., "SteppedScheduler"]

OUTPUT_TOKEN = 7
"""As in `SteppedScheduler`."""

GATES = [["open"], ["credit"], ["slack"], ["slack", "credit", "open"]]


def accept(name: str, length: int, drafts: int) -> int:
    """Return a number of accepted drafts that depends only on the request and its length."""
    return zlib.crc32(f"{name}/{length}".encode()) % (drafts + 1)


class SameAcceptance:
    """Accepts as `accept` does (`engine_adapter.simulated.speculation.Speculation`)."""

    def __init__(self, draft_tokens: int) -> None:
        self.draft_tokens, self.draft_s = draft_tokens, 0.0

    def accepted(self, sequence: SimulatedSequence, drafts: int) -> int:
        return accept(sequence.request_id, sequence.length, drafts)


def tokens_of(step: Step) -> dict[str, int]:
    """Return the tokens that each sequence computes."""
    drafts = step.drafts or [0] * len(step.decodes)
    decodes = {s.request_id: 1 + n for s, n in zip(step.decodes, drafts, strict=True)}
    return decodes | {s.request_id: tokens + step.padding.get(s.request_id, 0) for s, tokens in step.chunks}


def random_request(rng: random.Random, name: str, gates: list[str]) -> SimulatedSequence:
    pace_s = rng.choice([None, None, 0.03, 0.05, 0.5, 2.0])
    kind = rng.choice([default_kind(pace_s)] * 3 + [ServiceKind.BEST_EFFORT, ServiceKind.YIELDING])
    if pace_s is None:
        kind = rng.choice([ServiceKind.DEADLINE_ONLY, ServiceKind.BEST_EFFORT, ServiceKind.YIELDING])
    return SimulatedSequence(name, rng.randint(1, 150), rng.randint(1, 60), pace_s, rng.choice(gates), kind)


def run_both(make: Make, seed: int, gates: list[str], blocks: int, budgets: list[int], drafts: int = 0) -> int:
    """Step both schedulers with the same arrivals; return the best-effort preemptions. Fails where steps differ."""
    rng = random.Random(seed)
    slots, budget = rng.choice([2, 4, 8, 24]), rng.choice(budgets)
    vllm = make(seqs=slots, blocks=blocks, budget=budget, overlap=False, drafts=drafts, accept=accept)
    # One of vLLM's blocks is its own.
    simulated = SimulatedScheduler(
        max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=300, kv_tokens=16 * (blocks - 1),
        gate=composite.Gates(), speculation=SameAcceptance(drafts),
    )  # fmt: skip
    for number in range(400):
        if number < 200 and rng.random() < 0.3:
            sequence = random_request(rng, f"r{number}", gates)
            vllm.add(
                sequence.request_id,
                sequence.prompt_tokens,
                sequence.output_tokens,
                tpot_ms=None if sequence.pace_s is None else 1000 * sequence.pace_s,
                gate=sequence.gate,
                kind=sequence.kind.label,
            )
            simulated.submit(sequence)
        step = simulated.plan(vllm.clock.now)
        assert vllm.step() == tokens_of(step), f"step {number}"
        simulated.finish(step)
        if not step.empty:
            report = step.report(vllm.steps[-1].elapsed_s)
            assert vllm.steps[-1] == report, f"report of step {number}"
            simulated.gate.observe(report)
    assert vllm.best_effort_preemptions == simulated.best_effort_preemptions
    return vllm.best_effort_preemptions


@pytest.mark.parametrize("gates", GATES, ids="-".join)
def test_steps_equal_simulated_scheduler(make: Make, gates: list[str]) -> None:
    preemptions = sum(run_both(make, seed, gates, blocks=1000, budgets=[32, 100, 512]) for seed in range(12))
    assert (preemptions > 0) == ("slack" in gates)


@pytest.mark.parametrize("drafts", [1, 3, 5])
@pytest.mark.parametrize("gates", GATES, ids="-".join)
def test_steps_with_speculation_equal_simulated_scheduler(make: Make, gates: list[str], drafts: int) -> None:
    for seed in range(4):
        run_both(make, seed, gates, blocks=1000, budgets=[32, 100, 512], drafts=drafts)


@pytest.mark.parametrize("drafts", [0, 3])
def test_steps_equal_simulated_scheduler_when_memory_is_short(make: Make, drafts: int) -> None:
    # vLLM allocates a prompt chunk by chunk, the simulated scheduler all of it, so only whole prompts are comparable.
    for seed in range(12):
        run_both(make, seed, ["open"], blocks=60, budgets=[4096], drafts=drafts)


def run_both_with_caching(make: Make, seed: int, blocks: int, budget: int, drafts: int = 0) -> int:
    """Step both schedulers with prompts that share prefixes; return the cached tokens. Fails where steps differ."""
    rng = random.Random(seed)
    slots = rng.choice([2, 4, 8])
    vllm = make(
        seqs=slots, blocks=blocks, budget=budget, overlap=False, caching=True, drafts=drafts, accept=accept,
        numbered=False,
    )  # fmt: skip
    simulated = SimulatedScheduler(
        max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=300, kv_tokens=16 * (blocks - 1),
        speculation=SameAcceptance(drafts),
    )  # fmt: skip
    histories = [[rng.randint(10, 60) for _ in range(rng.randint(1, 90))] for _ in range(4)]
    cached: list[int] = []
    for number in range(500):
        if number < 300 and rng.random() < 0.2:
            history = rng.choice(histories)
            prompt = history[: rng.choice([len(history), rng.randint(1, len(history))])]
            prompt = prompt + [rng.randint(10, 60) for _ in range(rng.randint(0, 40))]
            output = rng.randint(1, 40)
            context = prompt + [OUTPUT_TOKEN] * output
            if len(context) < 200:
                histories[rng.randrange(4)] = context
            vllm.add(f"r{number}", prompt, output, gate="open")
            simulated.submit(
                SimulatedSequence(
                    f"r{number}", len(prompt), output, blocks=block_hashes(0, context), on_cached=cached.append
                )
            )
        step = simulated.plan(vllm.clock.now)
        assert vllm.step() == tokens_of(step), f"step {number}"
        simulated.finish(step)
    return sum(cached)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("budget", [32, 512])
def test_prefix_cache_hits_equal_simulated_scheduler(make: Make, budget: int, drafts: int) -> None:
    seeds = range(4 if drafts else 12)
    cached = sum(run_both_with_caching(make, seed, blocks=1000, budget=budget, drafts=drafts) for seed in seeds)
    assert cached > 800 * len(seeds)


@pytest.mark.parametrize("drafts", [0, 3])
def test_evictions_equal_simulated_scheduler_when_memory_is_short(make: Make, drafts: int) -> None:
    cached = [
        sum(run_both_with_caching(make, seed, blocks=blocks, budget=4096, drafts=drafts) for seed in range(6))
        for blocks in (40, 80)
    ]
    assert 0 < cached[0] < cached[1], "less memory keeps fewer blocks"
