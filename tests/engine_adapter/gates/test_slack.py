"""The slack gate: prefill gets the time that the decoding requests can spare."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.base import StepPlan
from engine_adapter.gates.constants import SLACK
from engine_adapter.gates.slack import SlackGate
from engine_adapter.service_kind import ServiceKind, default_kind
from engine_adapter.step_report import StepReport
from engine_adapter.step_time.curve import SPENT, StepCurve
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import load_profile
from tests.fixtures.decoding import DecodingRequest, best_effort, deadline_only

TIMES = StepTimes(a=0.0, b=1e-3, c=0.0, d=0.01, alpha=1e-4, beta=0.0)
"""A step takes 10 ms, 1 ms per decode and 0.1 ms per prompt token."""


def slack_gate(times: StepTimes = TIMES) -> SlackGate:
    return SlackGate(StepTimeModel(times=times, learn=False))


def test_prefill_uses_its_share_of_the_least_slack() -> None:
    # Both got their first token at 0; the next are due at 30 and 50 ms. Decoding takes 12 ms: 18 ms are left.
    plan = slack_gate().plan(0.0, [DecodingRequest("strict"), DecodingRequest("loose", 0.05)], prefill_backlog=1000)
    assert plan.sit_out == set()
    assert plan.max_prefill_tokens == pytest.approx(SPENT * 180, abs=1)


def test_tokens_ahead_of_their_pace_allow_a_longer_step() -> None:
    gate, request = slack_gate(), DecodingRequest("r")
    gate.plan(0.0, [request], 1000)
    request.length += 4  # at 60 ms four more tokens are out; the next is due at 150 ms
    assert gate.plan(0.06, [request], 1000).max_prefill_tokens == pytest.approx(SPENT * 790, abs=1)


def test_late_request_does_not_limit_the_step() -> None:
    gate, late = slack_gate(), DecodingRequest("late")
    gate.plan(0.0, [late], 1000)
    with_fresh = gate.plan(5.0, [late, DecodingRequest("fresh", 0.05)], 1000)
    assert with_fresh.max_prefill_tokens == pytest.approx(SPENT * 380, abs=1)
    assert gate.plan(5.0, [late], 1000) == StepPlan()


@pytest.mark.parametrize(
    ("decoding", "backlog"),
    [
        ([], 1000),
        ([best_effort("b"), deadline_only("d")], 1000),
        ([DecodingRequest("r")], 0),
        ([DecodingRequest("r")], 189),
    ],
    ids=["no decodes", "no paced request", "nothing to prefill", "all prefill fits"],
)
def test_step_is_vllms_own_if_no_request_would_be_late(decoding: list[DecodingRequest], backlog: int) -> None:
    assert slack_gate().plan(0.0, decoding, backlog) == StepPlan()


def test_small_chunk_waits_for_slack_for_a_large_one() -> None:
    # Any prefill costs 5 ms, and each token 0.1 ms: slack that computes 150 tokens in three steps computes 250 in one.
    curve = replace(StepCurve.of(TIMES), h=0.005)
    gate, request = SlackGate(StepTimeModel(times=TIMES, curve=curve, learn=False)), DecodingRequest("r", 0.05)
    gate.plan(0.0, [request], 1000)
    assert gate.plan(0.026, [request], 1000).max_prefill_tokens == 0, "24 ms are left of 50, a step takes 11"
    assert gate.plan(0.010, [request], 1000).max_prefill_tokens == pytest.approx(SPENT * 290 - 50, abs=1)


def test_last_tokens_of_a_prompt_get_a_small_chunk() -> None:
    plan = slack_gate().plan(0.0, [DecodingRequest("r", 0.0125)], 10)
    assert plan == StepPlan()


def test_forgotten_request_starts_with_new_due_times() -> None:
    gate, request = slack_gate(), DecodingRequest("r")
    gate.plan(0.0, [request], 1000)
    gate.forget("r")
    assert gate.plan(9.0, [request], 1000).max_prefill_tokens == pytest.approx(SPENT * 190, abs=1)


def test_slack_gate_learns_step_times() -> None:
    gate = SlackGate()
    for batch in range(1, 33):
        gate.observe(StepReport(batch, 0, 100.0, 0.02 + 1e-3 * batch))
        gate.observe(StepReport(batch, 10 * batch, 100.0, 0.02 + 1e-3 * batch + 0.5e-3 * 10 * batch))
    plan = gate.plan(0.0, [DecodingRequest("r", 0.121)], 10_000)
    assert plan.max_prefill_tokens == pytest.approx(SPENT * 200, rel=0.15)


A100, PACE_S, BATCH, CONTEXT = load_profile("a100-llama3.1-8b"), 0.03, 116, 400


def seconds(decodes: int, prefill: int) -> float:
    return A100.step_seconds(decodes, CONTEXT * decodes, prefill, 0)


def prefill_by_step(observed: list[tuple[int, int]], count: int) -> list[int]:
    """Prompt tokens in each of ``count`` steps of a full A100, with one departure and one arrival every other step.

    ``observed``: the steps (decodes, prompt tokens) that the gate has learned from before.
    """
    gate, chunks, now = SlackGate(), [], 0.0
    for decodes, prefill in observed:
        gate.observe(StepReport(decodes, prefill, CONTEXT, seconds(decodes, prefill)))
    batch = [DecodingRequest(str(number), PACE_S, CONTEXT) for number in range(BATCH)]
    for step in range(count):
        chunk = gate.plan(now, batch, prefill_backlog=2048).max_prefill_tokens
        assert chunk is not None
        chunks.append(chunk)
        gate.observe(StepReport(BATCH, chunk, CONTEXT, seconds(BATCH, chunk)))
        now += seconds(BATCH, chunk)
        for request in batch:
            request.length += 1
        if step % 2:
            gate.forget(batch.pop(0).request_id)
            batch.append(DecodingRequest(str(BATCH + step), PACE_S, CONTEXT))
    assert now <= count * PACE_S
    return chunks


def test_gate_that_overestimates_prefill_cost_corrects_itself() -> None:
    # A few tokens are free until the next wave of tiles begins. A gate that took only those, as the best bargain, would
    # never learn what larger chunks cost, although there is time for ten times as many tokens.
    small = [(tokens, prefill) for tokens in range(1, 129) for prefill in (0, 129 - tokens)]
    of_all_sizes = small + [(tokens, 2 * prefill) for tokens in range(1, 256, 4) for prefill in range(0, 256, 8)]
    cold, warm, free = prefill_by_step(small, 256), prefill_by_step(of_all_sizes, 256), 128 - BATCH
    assert sum(warm) > 10 * 256 * free
    assert cold[0] > 4 * free, "before it has learned"
    assert sum(cold[:64]) > 0.4 * sum(warm[:64])
    assert sum(cold[128:256]) > 0.6 * sum(warm[128:256])
    assert max(cold[128:256]) > 2.5 * cold[0]


def test_chunk_may_cost_a_quarter_more_than_predicted() -> None:
    gate, request = slack_gate(), DecodingRequest("r")
    chunk = gate.plan(0.0, [request], 1000).max_prefill_tokens
    assert chunk is not None
    assert TIMES.itl(1, 100) + 1.25 * TIMES.prefill(chunk) <= 0.03


def test_requests_without_pace_sit_out_full_steps_but_keep_their_share() -> None:
    gate, turn = slack_gate(), SLACK.steps_per_turn
    paced = [*[DecodingRequest(f"p{i}") for i in range(14)], DecodingRequest("loose", 2.0)]
    without_pace = [best_effort("b"), best_effort("waived", 0.03), deadline_only("d")]
    sat_out = []
    for step in range(100):
        # 15 decodes leave 5 ms of 30 for prefill, 18 leave 2: not enough for the backlog.
        plan = gate.plan(0.03 * step, [*paced, *without_pace], prefill_backlog=40)
        assert plan.sit_out in (set(), {"b", "waived", "d"})
        sat_out.append(bool(plan.sit_out))
        for request in paced:
            request.length += 1
    assert sat_out.count(False) == 100 * SLACK.best_effort_share
    assert max(len(run) for run in "".join("x" if s else "." for s in sat_out).split(".")) < turn


def test_requests_without_pace_decode_if_no_request_would_be_late() -> None:
    decoding = [DecodingRequest("p", 0.05), *[best_effort(f"b{i}") for i in range(10)]]
    assert slack_gate().plan(0.0, decoding, prefill_backlog=200) == StepPlan()
    assert slack_gate().plan(0.0, decoding[1:], prefill_backlog=10**6) == StepPlan()


def test_requests_without_pace_return_after_a_turn_of_steps_with_time_for_all() -> None:
    gate, paced = slack_gate(), DecodingRequest("p", 0.05)
    decoding = [paced, *[best_effort(f"b{i}") for i in range(10)]]

    def all_decode(step: int, backlog: int) -> bool:
        plan = gate.plan(0.05 * step, decoding, backlog)
        paced.length += 1
        return not plan.sit_out

    turn = SLACK.steps_per_turn
    first = [all_decode(step, 200 if step else 1000) for step in range(turn)]
    assert first == [False] * (turn - 1) + [True], "one step per turn is theirs"
    assert not all_decode(turn, 1000)
    assert [all_decode(turn + step, 0) for step in range(1, turn + 5)] == [False] * (turn - 2) + [True] * 6


def test_pace_above_one_second_limits_the_step() -> None:
    plan = slack_gate().plan(0.0, [DecodingRequest("r", 1.5)], prefill_backlog=100_000)
    assert plan.max_prefill_tokens == pytest.approx(SPENT * 14_890, abs=1)


REQUESTS = st.lists(
    st.one_of(
        st.builds(lambda pace_s: (pace_s, default_kind(pace_s)), st.none() | st.floats(0.005, 2.0)),
        st.builds(lambda pace_s: (pace_s, ServiceKind.BEST_EFFORT), st.floats(0.005, 2.0)),
        st.just((None, ServiceKind.DEADLINE_ONLY)),
    ),
    min_size=1,
    max_size=20,
)


@given(REQUESTS, st.integers(0, 5000))
def test_planned_step_makes_no_paced_request_late(
    requests: list[tuple[float | None, ServiceKind]], backlog: int
) -> None:
    decoding = [DecodingRequest(str(i), pace_s, kind=kind) for i, (pace_s, kind) in enumerate(requests)]
    plan = slack_gate().plan(0.0, decoding, backlog)
    assert not plan.sit_out & {r.request_id for r in decoding if r.kind is ServiceKind.PACED}
    prefill = backlog if plan.max_prefill_tokens is None else min(backlog, plan.max_prefill_tokens)
    strictest = min((r.pace_s for r in decoding if r.kind is ServiceKind.PACED and r.pace_s), default=math.inf)
    if prefill:
        assert TIMES.itl(len(decoding) - len(plan.sit_out), 100) + TIMES.prefill(prefill) <= strictest + 1e-9


@given(REQUESTS, st.integers(0, 5000))
def test_slack_gate_without_paced_requests_changes_nothing(
    requests: list[tuple[float | None, ServiceKind]], backlog: int
) -> None:
    decoding = [
        DecodingRequest(str(i), each[0], kind=each[1])
        for i, each in enumerate(requests)
        if each[1] is not ServiceKind.PACED
    ]
    assert slack_gate().plan(0.0, decoding, backlog) == StepPlan()


# --- yielding requests ------------------------------------------------------------------------------------------------


def yielding(request_id: str, pace_s: float = 0.03) -> DecodingRequest:
    return DecodingRequest(request_id, pace_s, kind=ServiceKind.YIELDING)


def test_yielding_requests_decode_beside_a_prompt_that_fills_the_slack() -> None:
    # A step of both takes 12 ms; a backlog of 250 tokens takes 25 ms more, and the pace is 30 ms.
    plan = slack_gate().plan(0.0, [DecodingRequest("paced"), yielding("y")], 250)
    assert plan.sit_out == set()
    assert plan.max_prefill_tokens == pytest.approx(SPENT * 180, abs=1)


def test_yielding_requests_without_a_pace_take_turns() -> None:
    batch = [DecodingRequest("paced"), DecodingRequest("y", None, kind=ServiceKind.YIELDING)]
    gate = slack_gate()
    turns = ["y" not in gate.plan(0.0, batch, 500).sit_out for _ in range(2 * SLACK.steps_per_turn)]
    assert sum(turns) == 2


def test_pace_of_yielding_requests_limits_only_their_own_prompts() -> None:
    batch = [DecodingRequest("paced", 0.1), yielding("y", 0.02)]
    assert slack_gate().plan(0.0, batch, 500) == StepPlan(), "62 ms of 100 ms"
    plan = slack_gate().plan(0.0, batch, 500, yielding_prompts=True)
    assert plan.sit_out == set()
    assert plan.max_prefill_tokens == pytest.approx(SPENT * 80, abs=1)


def test_yielding_requests_sit_out_when_a_step_of_all_is_too_long() -> None:
    batch = [DecodingRequest("paced", 0.02), *(yielding(f"y{i}", 0.05) for i in range(12))]
    assert slack_gate().plan(0.0, batch, 0).sit_out == {f"y{i}" for i in range(12)}
    assert slack_gate().plan(0.0, batch[:9], 0).sit_out == set()


def test_yielding_requests_alone_keep_their_pace() -> None:
    plan = slack_gate().plan(0.0, [yielding("y")], 1000, yielding_prompts=True)
    assert plan.sit_out == set()
    assert plan.max_prefill_tokens == pytest.approx(SPENT * 190, abs=1)


def test_yielding_requests_may_be_preempted() -> None:
    assert slack_gate().preemptible(yielding("y"))
    assert not slack_gate().preemptible(DecodingRequest("paced"))
