"""Prefix caching in the simulated scheduler, by examples worked out by hand and by properties of random runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.simulated.scheduler import BLOCK_TOKENS, STEP_MODES, SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.simulated.step import Finished, Step
from tests.fixtures.scheduler_workloads import ARRIVALS, GATES, LIMITS, MAX_MODEL_LEN, Arrival, run_to_completion

LARGE = {"max_num_seqs": 8, "max_num_batched_tokens": 1000, "max_model_len": 1000, "kv_tokens": 1600}
HASHES = tuple(range(1, 64))


def scheduler_of(**limits: Any) -> SimulatedScheduler:
    return SimulatedScheduler(**{**LARGE, **limits})


def serve(scheduler: SimulatedScheduler, *sequences: SimulatedSequence) -> list[dict[str, int]]:
    """Run the sequences to their end; return the prompt tokens that each step computed, by sequence."""
    for sequence in sequences:
        scheduler.submit(sequence)
    prefills = []
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan(0.0)
        prefills.append({s.request_id: tokens for s, tokens in step.chunks})
        scheduler.finish(step)
    return [step for step in prefills if step]


def turn(name: str, prompt: int, output: int = 1, hashes: tuple[int, ...] = HASHES, **fields: Any) -> SimulatedSequence:
    return SimulatedSequence(name, prompt, output, blocks=hashes, **fields)


def test_second_turn_computes_only_what_follows_the_first_turn_and_its_answer() -> None:
    # The first turn leaves 50 + 20 - 1 computed tokens: four full blocks. Turn two has 100 tokens.
    first, second = turn("1", 50, 20), turn("2", 100)
    scheduler = scheduler_of()
    assert serve(scheduler, first) == [{"1": 50}]
    assert serve(scheduler, second) == [{"2": 100 - 4 * BLOCK_TOKENS}]
    assert (first.cached_tokens, second.cached_tokens) == (0, 64)


def test_answer_token_that_fills_a_block_is_cached_only_if_computed() -> None:
    # 30 + 3 tokens: the 33rd is sampled, so 32 tokens are computed. With 30 + 2, the 32nd is only sampled.
    for output, cached in ((3, 32), (2, 16)):
        scheduler = scheduler_of()
        serve(scheduler, turn("1", 30, output))
        later = turn("2", 100)
        serve(scheduler, later)
        assert later.cached_tokens == cached


def test_at_least_one_token_of_a_cached_prompt_is_computed() -> None:
    scheduler = scheduler_of()
    serve(scheduler, turn("1", 64))
    assert serve(scheduler, turn("2", 64), turn("3", 65)) == [{"2": 16, "3": 1}]


def test_different_prefix_and_prompt_without_hashes_find_nothing() -> None:
    scheduler = scheduler_of()
    serve(scheduler, turn("1", 64))
    other, plain = turn("2", 64, hashes=tuple(-h for h in HASHES)), SimulatedSequence("3", 64, 1)
    assert serve(scheduler, other, plain) == [{"2": 64, "3": 64}]
    assert (other.cached_tokens, plain.cached_tokens) == (0, 0)


def test_prompts_of_one_step_share_blocks_and_hold_them_once() -> None:
    scheduler = scheduler_of()
    for name in ("1", "2"):
        scheduler.submit(turn(name, 100, 5))
    step = scheduler.plan(0.0)
    assert {s.request_id: tokens for s, tokens in step.chunks} == {"1": 100, "2": 4}
    assert step.prefill_context == 96
    # Seven blocks for the first, and one more for the tail of the second.
    assert scheduler.kv_usage == pytest.approx(8 / 100)
    scheduler.finish(step)
    scheduler.clear()
    assert scheduler.kv_usage == 0


def test_chunked_prompt_is_shared_as_far_as_it_is_computed() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=40)
    scheduler.submit(turn("1", 100, 5))
    scheduler.finish(scheduler.plan(0.0))  # 40 tokens: two full blocks
    later = turn("2", 100, 5)
    scheduler.submit(later)
    for _ in range(2):  # the first prompt takes the budget of one more step
        scheduler.finish(scheduler.plan(0.0))
    assert later.cached_tokens == 96, "by the step that admits the second prompt, the first is computed"


def test_memory_of_shared_blocks_admits_more_sequences() -> None:
    # Each prompt needs 7 blocks of 12. The second shares 6 of them.
    limits = {"kv_tokens": 12 * BLOCK_TOKENS, "max_model_len": 12 * BLOCK_TOKENS}
    for caching, running in ((True, 2), (False, 1)):
        scheduler = scheduler_of(**limits, prefix_caching=caching)
        for name in ("1", "2"):
            scheduler.submit(turn(name, 100, 5))
        scheduler.plan(0.0)
        assert scheduler.running == running


def test_cached_free_blocks_do_not_count_twice_as_free_memory() -> None:
    # Six blocks of the prefix are cached and free, five are held by another sequence, one is empty.
    scheduler = scheduler_of(kv_tokens=12 * BLOCK_TOKENS, max_model_len=12 * BLOCK_TOKENS)
    serve(scheduler, turn("1", 97))
    scheduler.submit(SimulatedSequence("other", 5 * BLOCK_TOKENS, 100))
    scheduler.finish(scheduler.plan(0.0))
    scheduler.submit(turn("2", 130))  # needs 9 blocks of 7 free ones
    scheduler.submit(turn("3", 97))
    assert not scheduler.plan(0.0).chunks


def test_preempted_sequence_finds_its_own_blocks() -> None:
    # Eight blocks: two sequences grow to four blocks each. Then the newer one is preempted, with 65 tokens. The older
    # one grows to seven blocks, so that one block of the newer one is left in the cache.
    old = turn("old", 40, 60, hashes=tuple(-h for h in HASHES))
    young = turn("young", 40, 60)
    scheduler = scheduler_of(kv_tokens=128, max_model_len=128)
    prefills = serve(scheduler, old, young)
    assert young.preemptions > 0
    assert prefills[1:] == [{"young": 65 - 16}]
    assert young.cached_tokens == 0, "the hit is that of its first admission"
    assert (old.generated, young.generated) == (60, 60)


def test_evicted_prefix_is_computed_again() -> None:
    scheduler = scheduler_of(kv_tokens=128, max_model_len=128)
    serve(scheduler, turn("1", 65))
    serve(scheduler, SimulatedSequence("big", 100, 5))  # takes seven of eight blocks
    again = turn("2", 64)
    serve(scheduler, again)
    assert again.cached_tokens == BLOCK_TOKENS, "only the head of the prefix survived"


def test_hits_of_a_hand_computed_workload() -> None:
    # Two users with the same system prompt of 32 tokens, two turns each.
    system = (1, 2)
    users = [system + tuple(range(base, base + 20)) for base in (100, 200)]
    scheduler = scheduler_of()
    requests = [
        turn("a1", 50, 30, users[0]),  # nothing is cached
        turn("b1", 50, 30, users[1]),  # the system prompt: 32
        turn("a2", 120, 30, users[0]),  # 79 computed tokens: 4 blocks, 64
        turn("b2", 120, 30, users[1]),  # likewise
    ]
    for request in requests:
        serve(scheduler, request)
    assert [request.cached_tokens for request in requests] == [0, 32, 64, 64]


def test_gate_sees_only_the_uncached_backlog() -> None:
    scheduler = scheduler_of()
    serve(scheduler, turn("1", 96))
    backlogs = []
    plan = scheduler.gate.plan
    scheduler.gate.plan = lambda now, decoding, backlog, _: (backlogs.append(backlog), plan(now, decoding, backlog))[1]  # type: ignore[method-assign]
    scheduler.submit(turn("2", 100))
    scheduler.plan(0.0)
    assert backlogs == [4]


@pytest.mark.parametrize("mode", STEP_MODES)
def test_hit_is_reported_once(mode: str) -> None:
    scheduler, hits = scheduler_of(step_mode=mode), []
    serve(scheduler, turn("1", 64, on_cached=hits.append))
    serve(scheduler, turn("2", 64, on_cached=hits.append))
    assert hits == [0, 48]


def test_prefill_first_counts_uncached_tokens_in_its_budget() -> None:
    scheduler = scheduler_of(step_mode="prefill-first", max_num_batched_tokens=100)
    serve(scheduler, turn("1", 96))
    assert serve(scheduler, SimulatedSequence("x", 80, 1), turn("2", 100), turn("3", 100)) == [
        {"x": 80, "2": 4, "3": 4},
    ]


# --- random runs --------------------------------------------------------------------------------------------------

PREFIXED = st.lists(st.integers(0, 2), min_size=10, max_size=10)
"""The conversation of each arrival. Arrivals of one conversation share their prefix."""


class PrefixedArrival(Arrival):
    conversation: int

    def sequence(self, name: str) -> SimulatedSequence:
        sequence = super().sequence(name)
        sequence.blocks = tuple(100 * self.conversation + block for block in range(20))
        return sequence


def prefixed(arrivals: list[Arrival], conversations: list[int]) -> list[Arrival]:
    made: list[Arrival] = []
    for arrival, conversation in zip(arrivals, conversations, strict=False):
        one = PrefixedArrival(**vars(arrival))
        object.__setattr__(one, "conversation", conversation)
        made.append(one)
    return made


def blocks_in_use(scheduler: SimulatedScheduler) -> int:
    sequences = list(scheduler.sequences())
    shared = {block for s in sequences for block in s.held_hashes}
    return len(shared) + sum(s.capacity // BLOCK_TOKENS - len(s.held_hashes) for s in sequences)


@given(ARRIVALS, PREFIXED, LIMITS, GATES, st.sampled_from(STEP_MODES))
def test_memory_holds_all_used_blocks_and_no_token_is_lost(
    arrivals: list[Arrival], conversations: list[int], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)
    blocks = -(-limits["kv_tokens"] // BLOCK_TOKENS)
    tokens: Counter[str] = Counter()

    def check(step: Step) -> None:
        assert blocks_in_use(scheduler) <= blocks
        assert scheduler.kv_usage == pytest.approx(blocks_in_use(scheduler) / blocks)
        assert all(s.capacity >= s.length for s in step.decodes)
        assert all(0 < chunk <= s.left for s, chunk in step.chunks)
        assert step.prefill_tokens == sum(chunk for _, chunk in step.chunks)

    def record(step: Step, finished: Finished) -> None:
        tokens.update(s.request_id for s in (*step.decodes, *finished.prefilled))

    sequences = run_to_completion(scheduler, prefixed(arrivals, conversations), check, record)
    assert [tokens[s.request_id] for s in sequences] == [arrival.output for arrival in arrivals]
    assert all(s.cached_tokens is not None and s.cached_tokens < s.prompt_tokens for s in sequences)
    assert scheduler.kv_usage == 0


@given(ARRIVALS, PREFIXED, LIMITS, GATES, st.sampled_from(STEP_MODES), st.integers(0, 60))
def test_aborts_release_shared_blocks(
    arrivals: list[Arrival], conversations: list[int], limits: dict[str, int], gate: Any, mode: str, aborted_at: int
) -> None:
    aborted = [replace(a, aborted_at=aborted_at if number % 2 else None) for number, a in enumerate(arrivals)]
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)
    sequences = run_to_completion(scheduler, prefixed(aborted, conversations))
    assert all(s.abandoned or s.generated == s.output_tokens for s in sequences)
    assert scheduler.kv_usage == 0


@given(ARRIVALS, LIMITS, st.sampled_from(STEP_MODES))
def test_distinct_prompts_run_the_same_steps_with_and_without_caching(
    arrivals: list[Arrival], limits: dict[str, int], mode: str
) -> None:
    """Without preemption, which would find own blocks, caching of distinct prompts changes nothing."""

    def steps(caching: bool) -> list[Any]:
        roomy = {**limits, "kv_tokens": 10 * 2 * MAX_MODEL_LEN}
        scheduler = SimulatedScheduler(**roomy, step_mode=mode, prefix_caching=caching)
        seen: list[Any] = []
        run_to_completion(
            scheduler,
            prefixed(arrivals, list(range(10))),
            lambda step: seen.append(
                ([s.request_id for s in step.decodes], [(s.request_id, n) for s, n in step.chunks])
            ),
        )
        return seen

    assert steps(True) == steps(False)
