"""SCORPIO's guards as the paper defines them, and where the authors' code departs from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import Decision
from gateway.policies.scorpio import Scorpio, VirtualBatch
from gateway.requests.request import BEST_EFFORT_PACE_S, Request
from tests.fixtures.policy_builders import NOW, TIMES, admitted, decide, engine, make_request, rejected, running

# --- TTFT guard -------------------------------------------------------------------------------------------------------


def test_scorpio_orders_by_deadline() -> None:
    queue = [
        make_request("late", at=NOW - 2, ttft=9),
        make_request("soon", ttft=1),
        make_request("never"),
        make_request("middle", at=NOW - 1, ttft=3),
    ]
    assert admitted(decide(Scorpio(), NOW, queue, [], engine())) == ["soon", "middle", "late", "never"]


def test_scorpio_orders_equal_deadlines_by_arrival() -> None:
    queue = [make_request("b", at=NOW - 1), make_request("a", at=NOW - 2), make_request("c")]
    assert admitted(decide(Scorpio(), NOW, queue, [], engine())) == ["a", "b", "c"]


def test_ttft_guard_rejects_by_the_sum_of_prefills_in_deadline_order() -> None:
    # Sums: 0.1, 0.2, 0.3, 0.4 s, and a margin of 50 ms. The third of four equal bounds of 0.3 s is too late.
    queue = [make_request(str(i), at=NOW + i * 1e-6, ttft=0.3) for i in range(4)]
    decision = decide(Scorpio(), NOW + 1e-5, queue, [], engine())
    assert (admitted(decision), rejected(decision)) == (["0", "1"], ["2", "3"])
    assert [r.predicted_s for r in decision.reject] == pytest.approx([0.3, 0.3], abs=1e-4)
    assert [r.attainable_s for r in decision.reject] == pytest.approx([0.35, 0.35], abs=1e-4)


@pytest.mark.parametrize("infeasible", [{"prompt": 1000}, {"prompt": 300, "tpot": 1e-3}])
def test_rejected_request_does_not_delay_the_next(infeasible: dict[str, float]) -> None:
    queue = [make_request("rejected", ttft=0.4, **infeasible), make_request("small", ttft=0.5, prompt=300)]
    decision = decide(Scorpio(), NOW, queue, [], engine())
    assert (admitted(decision), rejected(decision)) == (["small"], ["rejected"])


def test_ttft_guard_counts_unfinished_prefills_of_admitted_requests() -> None:
    unfinished = make_request("old", admitted_s=NOW, prompt=500)
    assert rejected(decide(Scorpio(), NOW, [make_request(ttft=0.5)], [unfinished], engine())) == ["r"]
    assert rejected(decide(Scorpio(), NOW, [make_request(ttft=0.5)], [running(prompt=500)], engine())) == []


def test_ttft_guard_counts_time_waited() -> None:
    request = make_request(at=NOW - 1, ttft=1.1)
    (rejection,) = decide(Scorpio(), NOW, [request], [], engine()).reject
    assert (rejection.bound, rejection.infeasible) == ("ttft", False)
    assert rejection.predicted_s == pytest.approx(1.1)


def test_ttft_below_an_idle_engines_prefill_is_infeasible() -> None:
    (rejection,) = decide(Scorpio(), NOW, [make_request(ttft=0.12)], [], engine()).reject
    assert rejection.infeasible


def test_scorpio_never_rejects_an_admitted_request() -> None:
    late = [make_request(str(i), at=NOW - 50, ttft=0.1, tpot=1e-3, admitted_s=NOW - 49) for i in range(3)]
    assert decide(Scorpio(), NOW, [], late, engine()) == Decision()


def test_scorpio_rechecks_when_a_waiting_request_becomes_late() -> None:
    decision = decide(Scorpio(), NOW, [make_request(ttft=1.0)], [], engine())
    assert decision.recheck_at == pytest.approx(NOW + 1.0 - 0.1 - 0.05)
    assert decide(Scorpio(), NOW, [make_request()], [], engine()).recheck_at is None


# --- TPOT guard -------------------------------------------------------------------------------------------------------


def mean_itl(step: StepTimes, running_set: list[Request], candidate: Request, first_k: int) -> float:
    """The sum of eq. 5 without eta: mean of ITL(VBS(R'), Lmean(R') + k) over y values of k from ``first_k``."""
    joined = [*running_set, candidate]
    p_min = min(r.pace_s for r in joined if r.pace_s is not None)
    vbs = sum(p_min / r.pace_s if r.pace_s else 1.0 for r in joined)
    mean_length = sum(r.length for r in joined) / len(joined)
    y = int(candidate.predicted_tokens)
    return sum(step.itl(vbs, mean_length + k) for k in range(first_k, first_k + y)) / y


RUNNING = st.lists(
    st.builds(
        lambda tpot, prompt, done: running(tpot=tpot, prompt=prompt, generated=done),
        st.none() | st.floats(0.01, 1), st.integers(1, 4000), st.integers(1, 500),
    ),
    max_size=12,
)  # fmt: skip


@given(RUNNING, st.floats(0.01, 1), st.integers(1, 4000), st.integers(1, 600))
def test_tpot_estimate_equals_the_sum_of_equation_5(old: list[Request], tpot: float, prompt: int, output: int) -> None:
    candidate = make_request(tpot=tpot, prompt=prompt, output=output)
    closed = VirtualBatch.of(old).tpot_with(candidate, StepTimeModel(times=TIMES))
    # The paper sums over k = 1..y, with a mean of (y+1)/2. The closed form has y/2, half a token of context less.
    exact = mean_itl(TIMES, old, candidate, first_k=1)
    half_a_token = (TIMES.a * (len(old) + 1) + TIMES.c) / 2
    assert closed <= exact + 1e-12
    assert exact - closed <= half_a_token + 1e-12
    from_zero = mean_itl(TIMES, old, candidate, first_k=0)
    assert closed == pytest.approx((exact + from_zero) / 2, abs=1e-12)


@pytest.mark.parametrize(("tpot", "admits"), [(0.017, True), (0.015, False)])
def test_tpot_guard_keeps_running_tpot_bounds(tpot: float, admits: bool) -> None:
    # VBS is 20 and a fraction, at 0.1 ms each plus 10 ms, times 1.3: about 15.8 ms.
    batch = [running(str(i), tpot=tpot) for i in range(20)]
    assert bool(decide(Scorpio(), NOW, [make_request(tpot=1.0)], batch, engine()).admit) == admits


def test_virtual_batch_counts_loose_bounds_by_their_trp() -> None:
    strict, loose = [running("s", tpot=0.05)], [running(str(i), tpot=0.5) for i in range(9)]
    batch = VirtualBatch.of([*strict, *loose])
    model = StepTimeModel(times=StepTimes(b=1.0, d=0.0, a=0.0, c=0.0))
    assert batch.tpot_with(make_request(tpot=0.5), model) == pytest.approx(1 + 10 * 0.1)


def test_tpot_guard_skips_a_request_that_does_not_fit() -> None:
    batch = [running(str(i), tpot=0.02) for i in range(30)]
    queue = [make_request("strict", ttft=1, tpot=0.0145), make_request("easy", ttft=5, tpot=0.5)]
    decision = decide(Scorpio(), NOW, queue, batch, engine())
    assert (admitted(decision), rejected(decision)) == (["easy"], [])


@pytest.mark.parametrize("busy", [False, True])
def test_infeasible_tpot_is_rejected_even_while_the_batch_is_full(busy: bool) -> None:
    batch = [running(str(i)) for i in range(4)] if busy else []
    (rejection,) = decide(Scorpio(), NOW, [make_request(tpot=0.005)], batch, engine(max_num_seqs=4)).reject
    assert (rejection.bound, rejection.infeasible) == ("tpot", True)
    assert rejection.attainable_s == pytest.approx(1.3 * (TIMES.itl(1, 125)))


@pytest.mark.parametrize("e2e", [0.3, 0.65, 0.8])
def test_e2e_rejection_names_a_larger_attainable_e2e_bound(e2e: float) -> None:
    (rejection,) = decide(Scorpio(), NOW, [make_request(e2e=e2e, output=50)], [], engine()).reject
    assert rejection.bound == "e2e"
    assert rejection.attainable_s > e2e
    again = make_request(e2e=rejection.attainable_s * 1.001, output=50)
    following = decide(Scorpio(), NOW, [again], [], engine())
    assert admitted(following) or following.reject[0].attainable_s > rejection.attainable_s


def test_scorpio_admits_best_effort_whatever_its_bounds() -> None:
    request = make_request("free", tpot=1e-6, ttft=1e-6, bounds_waived=True)
    assert admitted(decide(Scorpio(), NOW, [request], [], engine())) == ["free"]
    assert request.pace_s == BEST_EFFORT_PACE_S


def test_running_best_effort_does_not_constrain_the_batch() -> None:
    batch = [running("free", tpot=1e-6, bounds_waived=True)]
    assert admitted(decide(Scorpio(), NOW, [make_request(tpot=0.05)], batch, engine())) == ["r"]


def test_best_effort_waits_while_it_would_break_a_running_bound() -> None:
    request = make_request("free", tpot=1e-6, ttft=1e-6, bounds_waived=True)
    full = [running(str(i), tpot=0.0155) for i in range(19)]
    state = engine(step_time=StepTimeModel(times=StepTimes(b=1e-4, d=0.0102)))
    assert decide(Scorpio(), NOW, [request], full, state) == Decision()


# --- switches, prefill lookahead, slots -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttft_guard", "tpot_guard", "admits", "rejects", "gate"),
    [
        (True, True, [], ["late", "strict"], "credit"),
        (True, False, ["strict"], ["late"], "open"),
        (False, True, ["late"], ["strict"], "credit"),
        (False, False, ["late", "strict"], [], "open"),
    ],
)
def test_scorpio_guards_can_be_switched_off(
    ttft_guard: bool, tpot_guard: bool, admits: list[str], rejects: list[str], gate: str
) -> None:
    late, strict = (
        make_request("late", at=NOW - 9, ttft=1, tpot=1),
        make_request("strict", at=NOW - 8, ttft=60, tpot=1e-3),
    )
    policy = Scorpio(ttft_guard=ttft_guard, tpot_guard=tpot_guard)
    decision = decide(policy, NOW, [strict, late], [], engine())
    assert (admitted(decision), sorted(rejected(decision)), policy.gate) == (admits, rejects, gate)


def test_scorpio_limits_unprefilled_prompts_to_the_lookahead() -> None:
    state = engine(max_num_batched_tokens=100)
    queue = [make_request(str(i), prompt=90) for i in range(5)]
    assert len(decide(Scorpio(prefill_lookahead_steps=2.0), NOW, queue, [], state).admit) == 2
    assert len(decide(Scorpio(prefill_lookahead_steps=4.0), NOW, queue, [], state).admit) == 4
    assert len(decide(Scorpio(), NOW, queue, [], engine(max_num_batched_tokens=100, reacts_late=True)).admit) == 3
    unfinished = [make_request("old", admitted_s=NOW, prompt=150)]
    assert decide(Scorpio(), NOW, queue, unfinished, state).admit == []


def test_scorpio_admits_a_long_prompt_when_the_lookahead_is_empty() -> None:
    state = engine(max_num_batched_tokens=100)
    assert admitted(decide(Scorpio(), NOW, [make_request(prompt=5000)], [running()], state)) == ["r"]


def test_scorpio_admits_more_sequences_than_slots_only_to_an_idle_engine() -> None:
    state = engine(max_num_seqs=4)
    assert decide(Scorpio(), NOW, [make_request(sequences=8)], [running()], state).admit == []
    assert admitted(decide(Scorpio(), NOW, [make_request(sequences=8)], [], state)) == ["r"]
