"""Memory of vLLM's requests over KV cache groups, beside the block pool of its own scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fixtures.vllm_stepping import SteppedScheduler

# vLLM is imported, which takes seconds and much memory; no engine is started.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Make = Callable[..., "SteppedScheduler"]


@pytest.mark.parametrize("window", [0, 40, 1000])
@pytest.mark.parametrize("overlap", [False, True])
def test_held_blocks_are_those_of_the_pool(make: Make, overlap: bool, window: int) -> None:
    rng = random.Random(window)
    engine = make(seqs=8, blocks=400, budget=64, overlap=overlap, window=window)
    groups, pool = engine.scheduler._kv_groups, engine.scheduler.kv_cache_manager.block_pool
    for number in range(250):
        if number % 10 == 0 and number < 150:
            engine.add(f"r{number}", rng.randint(1, 300), rng.randint(1, 100))
        engine.step()
        used = engine.blocks - 1 - pool.get_num_free_blocks()
        running = engine.scheduler.running
        held = sum(groups.held(request) for request in running)
        # Blocks that left the window since the last allocation are free only at the next one.
        left = 0 if window == 0 else sum(-(-64 // 16) + 1 for _ in running)
        assert held <= used <= held + left
        assert all(groups.held(r) <= groups.needed(max(r.num_tokens + 1, r.num_computed_tokens)) for r in running)


@pytest.mark.parametrize(
    ("window", "tokens", "blocks"),
    [
        (0, 160, 10),
        (1 << 20, 160, 20),
        # Beside the window, the group holds the tokens of the step in flight, and one block for alignment.
        (40, 160, 10 + 8),
        (40, 1600, 100 + -(-(39 + 64) // 16) + 1),
    ],
)
def test_needed_blocks_are_capped_by_the_window(make: Make, window: int, tokens: int, blocks: int) -> None:
    engine = make(seqs=8, blocks=400, budget=64, window=window)
    assert engine.scheduler._kv_groups.needed(tokens) == blocks


def test_capacity_is_halved_by_a_second_group(make: Make) -> None:
    one, two = (make(seqs=8, blocks=1000, budget=64, window=window) for window in (0, 1 << 20))
    assert one.reporter.report.kv_tokens == 16_000
    assert two.reporter.report.kv_tokens == 8_000


def test_capacity_is_less_reduced_by_a_short_window(make: Make) -> None:
    # 2,048 tokens take 128 blocks in one group, and 8 in the other.
    assert make(seqs=8, blocks=1400, budget=64, window=40).reporter.report.kv_tokens == 1400 * 2048 // 136


def test_best_effort_preemption_counts_all_groups(make: Make) -> None:
    for window, preempted in ((0, 0), (1 << 20, 1)):
        engine = make(seqs=8, blocks=51, budget=512, window=window)
        for number in range(2):
            engine.add(f"b{number}", 150, 100)
        for _ in range(4):
            engine.step()
        # 13 blocks for each group; the others have 20 to 22 for each of 50.
        engine.add("paced", 200, 5, tpot_ms=50)
        for _ in range(3):
            engine.step()
        assert engine.best_effort_preemptions == preempted
