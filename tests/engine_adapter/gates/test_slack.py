"""The slack gate: prefill gets what running requests can spare; and gates that share an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.base import StepPlan
from engine_adapter.gates.composite import GATES, Gates
from engine_adapter.gates.slack import BEST_EFFORT_SHARE, SlackGate
from engine_adapter.step_time.curve import SPENT, StepCurve
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import load_profile

TIMES = StepTimes(a=0.0, b=1e-3, c=0.0, d=0.01, alpha=1e-4, beta=0.0)
"""A step takes 10 ms, 1 ms a decode and 0.1 ms a prompt token."""


@dataclass
class Running:
    request_id: str
    tpot_slo_s: float | None = 0.03
    length: int = 100
    gate: str = ""


def slack_gate(times: StepTimes = TIMES) -> SlackGate:
    return SlackGate(StepTimeModel(times=times, learn=False))


def test_a_step_is_as_long_as_the_least_slack_allows_but_for_what_is_kept_back() -> None:
    # Both have their first token at 0 and the next due at 30 and 50 ms. Decoding takes 12 ms: 18 ms are left.
    plan = slack_gate().plan(0.0, [Running("strict"), Running("loose", 0.05)], prefill_backlog=1000)
    assert plan.sit_out == set()
    assert plan.max_prefill_tokens == pytest.approx(SPENT * 180, abs=1)


def test_tokens_ahead_of_their_pace_are_slack_for_a_longer_step() -> None:
    gate, request = slack_gate(), Running("r")
    gate.plan(0.0, [request], 1000)
    request.length += 4  # at 60 ms four more tokens are out; the next is due at 150 ms
    assert gate.plan(0.06, [request], 1000).max_prefill_tokens == pytest.approx(SPENT * 790, abs=1)


def test_whoever_is_late_already_holds_nobody_up() -> None:
    gate, late = slack_gate(), Running("late")
    gate.plan(0.0, [late], 1000)
    assert gate.plan(5.0, [late, Running("fresh", 0.05)], 1000).max_prefill_tokens == pytest.approx(SPENT * 380, abs=1)
    assert gate.plan(5.0, [late], 1000) == StepPlan()


@pytest.mark.parametrize(
    ("decoding", "backlog"),
    [([], 1000), ([Running("r", None)], 1000), ([Running("r")], 0), ([Running("r")], 189)],
    ids=["nobody decodes", "nobody has a bound", "nothing to prefill", "all of it fits"],
)
def test_where_nobody_is_at_risk_the_step_is_the_engines_own(decoding: list[Running], backlog: int) -> None:
    assert slack_gate().plan(0.0, decoding, backlog) == StepPlan()


def test_a_chunk_too_small_to_be_worth_it_waits_until_there_is_slack_for_a_large_one() -> None:
    # 5 ms for any prefill at all, and 0.1 ms a token: the slack for 50 tokens in three steps computes 250 in one.
    curve = replace(StepCurve.of(TIMES), h=0.005)
    gate, request = SlackGate(StepTimeModel(times=TIMES, curve=curve, learn=False)), Running("r", 0.05)
    gate.plan(0.0, [request], 1000)
    assert gate.plan(0.026, [request], 1000).max_prefill_tokens == 0, "24 ms are left of 50, a step takes 11"
    assert gate.plan(0.010, [request], 1000).max_prefill_tokens == pytest.approx(SPENT * 290 - 50, abs=1)


def test_the_last_few_tokens_of_a_prompt_are_worth_a_small_chunk() -> None:
    plan = slack_gate().plan(0.0, [Running("r", 0.0125)], 10)
    assert plan == StepPlan()


def test_a_gate_that_forgot_a_request_starts_its_pace_anew() -> None:
    gate, request = slack_gate(), Running("r")
    gate.plan(0.0, [request], 1000)
    gate.forget("r")
    assert gate.plan(9.0, [request], 1000).max_prefill_tokens == pytest.approx(SPENT * 190, abs=1)


def test_it_learns_how_long_steps_take() -> None:
    gate = SlackGate()
    for batch in range(1, 33):
        gate.observe(batch, 0, 100.0, 0.02 + 1e-3 * batch)
        gate.observe(batch, 10 * batch, 100.0, 0.02 + 1e-3 * batch + 0.5e-3 * 10 * batch)
    plan = gate.plan(0.0, [Running("r", 0.121)], 10_000)
    assert plan.max_prefill_tokens == pytest.approx(SPENT * 200, rel=0.15)


A100, PACE_S, BATCH, CONTEXT = load_profile("a100-llama3.1-8b"), 0.03, 116, 400


def seconds(decodes: int, prefill: int) -> float:
    return A100.step_seconds(decodes, CONTEXT * decodes, prefill, 0)


def prefilled(told: list[tuple[int, int]], count: int) -> list[int]:
    """Prompt tokens in each step of a full A100, where a request ends and one begins every other step; ``told``: steps
    (of decodes and prompt tokens) that its gate has seen before."""
    gate, chunks, now = SlackGate(), [], 0.0
    for decodes, prefill in told:
        gate.observe(decodes, prefill, CONTEXT, seconds(decodes, prefill))
    batch = [Running(str(number), PACE_S, CONTEXT) for number in range(BATCH)]
    for step in range(count):
        chunk = gate.plan(now, batch, prefill_backlog=2048).max_prefill_tokens
        assert chunk is not None
        chunks.append(chunk)
        gate.observe(BATCH, chunk, CONTEXT, seconds(BATCH, chunk))
        now += seconds(BATCH, chunk)
        for request in batch:
            request.length += 1
        if step % 2:
            gate.forget(batch.pop(0).request_id)
            batch.append(Running(str(BATCH + step), PACE_S, CONTEXT))
    assert now <= count * PACE_S
    return chunks


def test_a_gate_that_believes_prompt_tokens_dear_finds_out_by_spending_what_is_spare() -> None:
    # Few tokens are free until the next wave begins. Who took those and no others, as the best bargain, would never see
    # what larger chunks cost, while there is time for ten times as many.
    small = [(tokens, prefill) for tokens in range(1, 129) for prefill in (0, 129 - tokens)]
    of_all_sizes = small + [(tokens, 2 * prefill) for tokens in range(1, 256, 4) for prefill in range(0, 256, 8)]
    cold, knowing, free = prefilled(small, 256), prefilled(of_all_sizes, 256), 128 - BATCH
    assert sum(knowing) > 10 * 256 * free
    assert cold[0] > 4 * free, "before it knows better"
    assert sum(cold[:64]) > 0.4 * sum(knowing[:64])
    assert sum(cold[128:256]) > 0.6 * sum(knowing[128:256])
    assert max(cold[128:256]) > 2.5 * cold[0]


def test_a_chunk_may_turn_out_a_quarter_dearer_than_believed_and_nobody_is_late() -> None:
    gate, request = slack_gate(), Running("r")
    chunk = gate.plan(0.0, [request], 1000).max_prefill_tokens
    assert chunk is not None
    assert TIMES.itl(1, 100) + 1.25 * TIMES.prefill(chunk) <= 0.03


def test_those_without_a_pace_let_a_full_step_pass_but_have_their_share_of_steps() -> None:
    gate = slack_gate()
    paced, free = [Running(f"p{i}") for i in range(15)], [Running("f", None), Running("late", 2.0)]
    sat_out = []
    for step in range(100):
        # 15 decodes leave 5 ms of 30 for prefill, 17 leave 3: not enough for what waits.
        plan = gate.plan(0.03 * step, [*paced, *free], prefill_backlog=40)
        assert plan.sit_out in (set(), {"f", "late"})
        sat_out.append(bool(plan.sit_out))
        for request in paced:
            request.length += 1
    assert sat_out.count(False) == 100 * BEST_EFFORT_SHARE
    assert max(len(run) for run in "".join("x" if s else "." for s in sat_out).split(".")) < 1 / BEST_EFFORT_SHARE


def test_those_without_a_pace_decode_with_the_rest_where_nobody_is_at_risk() -> None:
    crowd = [Running("p", 0.05), *[Running(f"f{i}", None) for i in range(10)]]
    assert slack_gate().plan(0.0, crowd, prefill_backlog=200) == StepPlan()
    assert slack_gate().plan(0.0, crowd[1:], prefill_backlog=10**6) == StepPlan()


def test_those_without_a_pace_come_back_when_a_whole_turn_of_steps_had_time_for_all() -> None:
    gate, paced = slack_gate(), Running("p", 0.05)
    crowd = [paced, *[Running(f"f{i}", None) for i in range(10)]]

    def joins(step: int, backlog: int) -> bool:
        plan = gate.plan(0.05 * step, crowd, backlog)
        paced.length += 1
        return not plan.sit_out

    turn = round(1 / BEST_EFFORT_SHARE)
    assert [joins(step, 200 if step else 1000) for step in range(turn)] == [False] * (turn - 1) + [True], "their share"
    assert not joins(turn, 1000)
    assert [joins(turn + step, 0) for step in range(1, turn + 5)] == [False] * (turn - 2) + [True] * 6


BOUNDS = st.lists(st.none() | st.floats(0.005, 1.0), min_size=1, max_size=20)


@given(BOUNDS, st.integers(0, 5000))
def test_no_step_that_it_allows_makes_anybody_late_who_is_not(bounds: list[float | None], backlog: int) -> None:
    decoding = [Running(str(i), bound) for i, bound in enumerate(bounds)]
    plan = slack_gate().plan(0.0, decoding, backlog)
    assert all(r.tpot_slo_s is None or r.tpot_slo_s >= 1 for r in decoding if r.request_id in plan.sit_out)
    prefill = backlog if plan.max_prefill_tokens is None else min(backlog, plan.max_prefill_tokens)
    strictest = min((bound for bound in bounds if bound is not None), default=None)
    if prefill and strictest is not None:
        assert TIMES.itl(len(decoding) - len(plan.sit_out), 100) + TIMES.prefill(prefill) <= strictest + 1e-9


# --- several gates in one engine --------------------------------------------------------------------------------------


def test_each_request_is_paced_by_the_gate_it_names() -> None:
    gates = Gates("open")
    credit = [Running("a", 0.03, gate="credit"), Running("b", 0.06, gate="credit")]
    free = [Running("c", 0.5), Running("d", 0.9, gate="no such gate")]
    sat_out = [gates.plan(0.1 * step, [*credit, *free], 0).sit_out for step in range(4)]
    assert sat_out == [{"b"}, set(), {"b"}, set()]


def test_the_least_prefill_that_a_gate_allows_is_what_there_is() -> None:
    gates = Gates("open")
    mixed = [Running("a", 0.03, gate="slack"), Running("b", 0.06, gate="credit")]
    plan = gates.plan(0.0, mixed, 10_000)
    assert plan.max_prefill_tokens is not None
    assert plan.max_prefill_tokens < 10_000


def test_a_gate_first_named_late_has_heard_of_the_steps_before() -> None:
    gates = Gates("open")
    gates.plan(0.0, [Running("a")], 0)
    for batch in range(1, 65):
        gates.observe(batch % 16 + 1, 0, 100.0, 0.5)
        gates.observe(batch % 16 + 1, 50, 100.0, 0.6)
    plan = gates.plan(1.0, [Running("b", 0.1, gate="slack")], 1000)
    assert plan.max_prefill_tokens == 0, "steps take half a second here: there is no slack in a tenth"


def test_every_gate_has_a_name_and_a_wrong_one_is_refused_with_the_right_ones() -> None:
    assert set(GATES) == {"open", "credit", "slack"}
    with pytest.raises(ValueError, match=r"'best' is not a step gate; choose one of open, credit, slack"):
        Gates("best")
