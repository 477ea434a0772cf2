"""Sessions: prompts that repeat the history, fixed arrival times, and the given rate."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from lab.workload import WorkloadRequest, make_workload
from lab.workload.sessions import BLOCK_TOKENS, MAX_PROMPT, SESSIONS

NAMES = sorted(SESSIONS)


@cache
def workload_of(name: str) -> list[WorkloadRequest]:
    return make_workload(name, qps=10, duration_s=100, seed=1)


def histories(workload: list[WorkloadRequest]) -> list[list[WorkloadRequest]]:
    """The turns of each history, in order. Turns with the same first block of their own belong together."""
    found: dict[int, list[WorkloadRequest]] = defaultdict(list)
    for request in workload:
        found[request.blocks[request.messages[0] // BLOCK_TOKENS]].append(request)
    return list(found.values())


@pytest.mark.parametrize("name", NAMES)
def test_each_turn_repeats_the_history_with_the_answer(name: str) -> None:
    turns = 0
    for history in histories(workload_of(name)):
        for earlier, later in pairwise(history):
            turns += 1
            assert later.at_s > earlier.at_s
            assert later.blocks[: len(earlier.blocks)] == earlier.blocks
            assert later.messages[:-1] == (*earlier.messages, earlier.output_tokens)
            assert later.prompt_tokens == earlier.prompt_tokens + earlier.output_tokens + later.messages[-1]
            assert later.category == earlier.category
    assert turns > 200


@pytest.mark.parametrize("name", NAMES)
def test_blocks_cover_prompt_and_answer_and_messages_the_prompt(name: str) -> None:
    for request in workload_of(name):
        assert len(request.blocks) == math.ceil((request.prompt_tokens + request.output_tokens) / BLOCK_TOKENS)
        assert len(set(request.blocks)) == len(request.blocks)
        assert sum(request.messages) == request.prompt_tokens
        assert len(request.messages) % 2 == 0, "the last message is the user's"
        assert all(0 <= block < 1 << 63 for block in request.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_sessions_of_one_application_share_its_system_prompt_only(name: str) -> None:
    by_application: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    own: set[int] = set()
    for history in histories(workload_of(name)):
        system = history[0].messages[0]
        by_application[system].add(history[0].blocks[: system // BLOCK_TOKENS])
        private = set(history[-1].blocks[system // BLOCK_TOKENS :])
        assert not private & own
        own |= private
    assert sorted(by_application) == sorted(SESSIONS[name].applications)
    assert all(len(prompts) == 1 for prompts in by_application.values())
    assert all(tokens % BLOCK_TOKENS == 0 for tokens in by_application)


@pytest.mark.parametrize("name", NAMES)
def test_rate_counts_all_turns_and_is_there_from_the_start(name: str) -> None:
    counts = np.zeros(4)
    for seed in range(6):
        at_s = [request.at_s for request in make_workload(name, qps=20, duration_s=100, seed=seed)]
        assert at_s == sorted(at_s)
        counts += np.histogram(at_s, bins=4, range=(0, 100))[0]
    assert counts / (6 * 25) == pytest.approx([20.0] * 4, rel=0.15)


def test_burstiness_applies_to_session_starts() -> None:
    plain = make_workload("multi-turn", qps=10, duration_s=60)
    bursty = make_workload("multi-turn", qps=10, duration_s=60, arrivals="gamma", burstiness=4.0)
    assert [r.at_s for r in plain] != [r.at_s for r in bursty]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_with_history_keep_their_limit(name: str) -> None:
    longest = max(request.prompt_tokens for request in make_workload(name, qps=20, duration_s=200))
    assert longest <= MAX_PROMPT
    limited = make_workload(name, qps=20, duration_s=100, max_prompt=4000, max_output=30)
    assert 3500 < max(request.prompt_tokens for request in limited) <= 4000 or name == "multi-turn"
    assert max(request.output_tokens for request in limited) <= 30


def test_full_history_starts_over_with_the_system_prompt() -> None:
    workload = make_workload("agents", qps=20, duration_s=200, max_prompt=4000)
    restarted = [h for h in histories(workload) if len(h[0].messages) == 2 and h[0].prompt_tokens < 4000]
    assert len(restarted) > len(workload) / 20, "more histories than sessions of 20 turns"
    assert len(workload) == len(make_workload("agents", qps=20, duration_s=200)), "no turn is lost"


def test_agents_have_their_own_bounds_and_others_on_request() -> None:
    assert {r.ttft_slo_s for r in make_workload("agents", qps=20, duration_s=60)} == {0.5, 1.0}
    gemma = make_workload("agents", qps=20, duration_s=60, slo_table="code-chat")
    assert {r.category for r in gemma} <= {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"arrivals": "trace"}, "sessions of agents have no trace: use poisson or gamma"),
        ({"max_prompt": 3520}, "system prompts of 3520 tokens: max_prompt must be above that"),
        ({"mix": {3: 1}}, "categories 1 to 2"),
    ],
)
def test_invalid_argument_of_sessions_raises_with_the_fix(wrong: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make_workload("agents", **{"qps": 1.0, "requests": 1, **wrong})


def test_many_sessions_are_made_fast() -> None:
    started = time.process_time()
    assert len(make_workload("multi-turn", qps=60, duration_s=120)) > 5000
    # 0.4 s on an idle core; the limit allows for a busy machine.
    assert time.process_time() - started < 4
