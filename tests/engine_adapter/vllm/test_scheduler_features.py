"""Features of vLLM on its own scheduler with the step gate, without a model: docs/vllm-features.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fixtures.vllm_stepping import SteppedScheduler

# vLLM is imported, which takes seconds; no engine is started.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Make = Callable[..., "SteppedScheduler"]


@pytest.mark.parametrize("chunked", [True, False])
def test_prompt_larger_than_the_slack_is_computed(make: Make, chunked: bool) -> None:
    """Its 1,000 tokens take 200 ms, and a pace of 31 ms at steps of `STEP_S` never leaves that much."""
    engine = make(seqs=4, blocks=1000, budget=4096, chunked=chunked)
    engine.add("paced", 10, 400, tpot_ms=31)
    for _ in range(5):
        engine.step()
    engine.add("long", 1000, 5, tpot_ms=31)
    chunks = [engine.step().get("long", 0) for _ in range(100)]
    prompt = [tokens for tokens in chunks if tokens > 1]
    if chunked:
        assert len(prompt) > 5
        assert sum(prompt) == 1000
    else:
        assert prompt == [1000]
    engine.drain()
    assert engine.generated == {"paced": 400, "long": 5}


def test_priority_policy_orders_paced_and_held_prompts(make: Make) -> None:
    """vLLM's order holds for paced requests, and for the prompts of yielding ones that the gate held for some steps."""
    engine = make(seqs=2, blocks=1000, policy="priority")
    engine.add("steady", 10, 150, tpot_ms=31)
    engine.add("running", 10, 30, tpot_ms=31)
    engine.step()
    for number, kind in enumerate(["yielding", None, None, "yielding"]):
        engine.add(f"priority {4 - number}", 10, 5, tpot_ms=31, kind=kind, priority=4 - number)
    order = list(dict.fromkeys(name for _ in range(140) for name in engine.step()))
    # Those of others come first, each group by priority.
    assert order == ["steady", "running", "priority 2", "priority 3", "priority 1", "priority 4"]
    assert engine.best_effort_preemptions == 0
    engine.drain()
    assert engine.generated == {"steady": 150, "running": 30, **{f"priority {number}": 5 for number in range(1, 5)}}


def test_second_turn_of_a_session_keeps_its_pace(make: Make) -> None:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    def turn(tokens: int) -> Request:
        xargs = {"antares_tpot_ms": 31, "antares_gate": "slack"}
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=xargs)
        params.update_from_generation_config({}, 2)
        return Request("session", [1] * 10, params, None, resumable=True)

    engine = make(seqs=4, blocks=1000, budget=4096)
    engine.scheduler.add_request(turn(20))
    for _ in range(40):
        engine.step()
    assert engine.generated["session"] == 20
    engine.clock.now += 5  # the user thinks
    engine.scheduler.add_request(turn(100))
    for _ in range(5):
        engine.step()
    engine.add("long", 1000, 5, tpot_ms=31)
    prompt = [tokens for _ in range(60) if (tokens := engine.step().get("long", 0)) > 1]
    assert sum(prompt) == 1000
    assert len(prompt) > 5, "the prompt gets the slack of the session only"
    for _ in range(100):
        engine.step()
    assert engine.generated == {"session": 120, "long": 5}
    engine.abort("session")
    engine.drain()


def test_scheduler_of_a_server_refuses_pipeline_parallel(make: Make) -> None:
    with pytest.raises(
        SystemExit, match=r"^Antares: pipeline-parallel-size is not supported: with stages several steps"
    ):
        make(seqs=4, blocks=100, pipeline=2)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_padded_prompt_is_computed_beside_tight_paces(make: Make, cached: bool, overlap: bool) -> None:
    """With drafts, vLLM pads the only token of a prompt to four, and the slack of a step is one."""
    engine = make(seqs=4, blocks=1000, budget=512, drafts=3, caching=cached, overlap=overlap, numbered=False)
    prompt = list(range(10, 43)) if cached else [10]
    if cached:
        engine.add("before", prompt, 1)
        engine.drain()
    engine.add("paced", 10, 200, tpot_ms=14.5)
    for _ in range(20):
        engine.step()
    engine.steps.clear()
    engine.add("short", prompt, 5, tpot_ms=31)
    assert any(engine.step().get("short") == 4 for _ in range(20))
    engine.step()
    padded = [step for step in engine.steps if step.prefill_tokens]
    assert [step.prefill_tokens for step in padded] == [4], "padding is no draft"
    assert all(step.draft_tokens <= 3 * step.drafting_requests for step in padded)
    engine.drain()


def test_yielding_prompt_does_not_overtake_after_an_empty_step(make: Make) -> None:
    """While the last token of the only running request is in flight, a step is empty, but nothing blocks the others."""
    engine = make(seqs=1, blocks=1000)
    engine.add("running", 10, 5, tpot_ms=31)
    engine.step()
    engine.add("yielding", 10, 5, tpot_ms=31, kind="yielding")
    engine.add("paced", 10, 5, tpot_ms=31)
    steps = [engine.step() for _ in range(20)]
    assert {} in steps
    assert list(dict.fromkeys(name for step in steps for name in step)) == ["running", "paced", "yielding"]
    engine.drain()


def test_held_chunk_with_the_only_slot_continues(make: Make) -> None:
    engine = make(seqs=1, blocks=1000, budget=64)
    engine.add("yielding", 300, 5, tpot_ms=31, kind="yielding")
    engine.step()
    engine.add("paced", 10, 5, tpot_ms=31)
    steps = [engine.step() for _ in range(40)]
    assert {} in steps
    assert list(dict.fromkeys(name for step in steps for name in step)) == ["yielding", "paced"]
    engine.drain()
    assert engine.generated == {"yielding": 5, "paced": 5}
