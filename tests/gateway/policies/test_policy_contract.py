"""SCORPIO as the paper has it, without what the authors' code got wrong; and its baselines beside it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import Decision, prefill_backlog
from gateway.policies.fcfs import Fcfs
from gateway.policies.registry import POLICIES, make_policy
from gateway.policies.scorpio import Scorpio, _Batch
from gateway.requests.request import BEST_EFFORT_PACE_S, Request
from tests.fixtures.policy_builders import NOW, TIMES, admitted, ask, decide, engine, rejected, running

# --- TTFT guard -------------------------------------------------------------------------------------------------------


def test_the_least_deadline_goes_first_whatever_the_order_of_arrival() -> None:
    queue = [ask("late", at=NOW - 2, ttft=9), ask("soon", ttft=1), ask("never"), ask("middle", at=NOW - 1, ttft=3)]
    assert admitted(decide(Scorpio(), NOW, queue, [], engine())) == ["soon", "middle", "late", "never"]


def test_equal_deadlines_go_in_order_of_arrival() -> None:
    queue = [ask("b", at=NOW - 1), ask("a", at=NOW - 2), ask("c")]
    assert admitted(decide(Scorpio(), NOW, queue, [], engine())) == ["a", "b", "c"]


def test_estimated_ttft_is_the_running_sum_of_prefills_in_deadline_order() -> None:
    # Sums: 0.1, 0.2, 0.3, 0.4 s, and 50 ms in hand: the third of four equal bounds of 0.3 s is too late.
    queue = [ask(str(i), at=NOW + i * 1e-6, ttft=0.3) for i in range(4)]
    decision = decide(Scorpio(), NOW + 1e-5, queue, [], engine())
    assert (admitted(decision), rejected(decision)) == (["0", "1"], ["2", "3"])
    assert [r.predicted_s for r in decision.reject] == pytest.approx([0.3, 0.3], abs=1e-4)
    assert [r.attainable_s for r in decision.reject] == pytest.approx([0.35, 0.35], abs=1e-4)


def test_a_rejected_requests_share_is_free_for_those_behind_it() -> None:
    queue = [ask("huge", ttft=0.5, prompt=1000), ask("small", ttft=0.6, prompt=400)]
    decision = decide(Scorpio(), NOW, queue, [], engine())
    assert (admitted(decision), rejected(decision)) == (["small"], ["huge"])


def test_a_hopeless_tpots_share_is_free_too() -> None:
    queue = [ask("absurd", ttft=0.4, prompt=300, tpot=1e-3), ask("small", ttft=0.5, prompt=300)]
    decision = decide(Scorpio(), NOW, queue, [], engine())
    assert (admitted(decision), rejected(decision)) == (["small"], ["absurd"])


def test_admitted_prefills_that_are_not_done_count_before_the_queue() -> None:
    unfinished = ask("old", admitted_s=NOW, prompt=500)
    assert rejected(decide(Scorpio(), NOW, [ask(ttft=0.5)], [unfinished], engine())) == ["r"]
    assert rejected(decide(Scorpio(), NOW, [ask(ttft=0.5)], [running(prompt=500)], engine())) == []


def test_time_waited_counts_against_the_deadline() -> None:
    request = ask(at=NOW - 1, ttft=1.1)
    (rejection,) = decide(Scorpio(), NOW, [request], [], engine()).reject
    assert (rejection.bound, rejection.infeasible) == ("ttft", False)
    assert rejection.predicted_s == pytest.approx(1.1)


def test_what_not_even_an_idle_engine_could_do_is_hopeless() -> None:
    (rejection,) = decide(Scorpio(), NOW, [ask(ttft=0.12)], [], engine()).reject
    assert rejection.infeasible


def test_nothing_admitted_is_ever_rejected() -> None:
    late = [ask(str(i), at=NOW - 50, ttft=0.1, tpot=1e-3, admitted_s=NOW - 49) for i in range(3)]
    assert decide(Scorpio(), NOW, [], late, engine()) == Decision()


def test_the_next_decision_is_due_when_a_waiting_request_would_become_too_late() -> None:
    decision = decide(Scorpio(), NOW, [ask(ttft=1.0)], [], engine())
    assert decision.recheck_at == pytest.approx(NOW + 1.0 - 0.1 - 0.05)
    assert decide(Scorpio(), NOW, [ask()], [], engine()).recheck_at is None


# --- TPOT guard -------------------------------------------------------------------------------------------------------


def brute_force_tpot(step: StepTimes, running_set: list[Request], candidate: Request, from_k: int) -> float:
    """Equation 5 summed out: (1/y) * sum over k of ITL(VBS(R'), Lmean(R') + k), from k = ``from_k``, y terms."""
    everyone = [*running_set, candidate]
    strictest = min(r.tpot_slo_s for r in everyone if r.tpot_slo_s is not None)
    virtual = sum(strictest / r.tpot_slo_s if r.tpot_slo_s else 1.0 for r in everyone)
    mean = sum(r.length for r in everyone) / len(everyone)
    y = int(candidate.predicted_tokens)
    return sum(step.itl(virtual, mean + k) for k in range(from_k, from_k + y)) / y


BOUNDS = st.none() | st.floats(0.01, 1)
RUNNING = st.lists(
    st.builds(
        lambda tpot, prompt, done: running(tpot=tpot, prompt=prompt, generated=done),
        BOUNDS, st.integers(1, 4000), st.integers(1, 500),
    ),
    max_size=12,
)  # fmt: skip


@given(RUNNING, st.floats(0.01, 1), st.integers(1, 4000), st.integers(1, 600))
def test_the_closed_form_is_equation_5_summed_out(old: list[Request], tpot: float, prompt: int, output: int) -> None:
    candidate = ask(tpot=tpot, prompt=prompt, output=output)
    closed = _Batch.of(old).tpot_with(candidate, StepTimeModel(times=TIMES))
    # The paper sums k = 1..y, whose mean is (y+1)/2; the design's closed form has y/2, the mean over k = 0..y. They
    # differ by half a token of context, which is nothing to a step.
    exact = brute_force_tpot(TIMES, old, candidate, from_k=1)
    half_a_token = (TIMES.a * (len(old) + 1) + TIMES.c) / 2
    assert closed <= exact + 1e-12
    assert exact - closed <= half_a_token + 1e-12
    from_zero = brute_force_tpot(TIMES, old, candidate, from_k=0)
    assert closed == pytest.approx((exact + from_zero) / 2, abs=1e-12)


def test_a_request_is_admitted_only_if_it_breaks_no_running_requests_bound() -> None:
    def admits(strictest: float) -> bool:
        batch = [running(str(i), tpot=strictest) for i in range(20)]
        return bool(decide(Scorpio(), NOW, [ask(tpot=1.0)], batch, engine()).admit)

    # 20 and a fraction at 0.1 ms each on 10 ms, times 1.3: about 15.8 ms.
    assert admits(0.017)
    assert not admits(0.015)


def test_loose_bounds_count_less_than_one_in_the_batch() -> None:
    strict, loose = [running("s", tpot=0.05)], [running(str(i), tpot=0.5) for i in range(9)]
    bare = _Batch.of([*strict, *loose])
    model = StepTimeModel(times=StepTimes(b=1.0, d=0.0, a=0.0, c=0.0))
    assert bare.tpot_with(ask(tpot=0.5), model) == pytest.approx(1 + 10 * 0.1)


def test_a_request_that_does_not_fit_now_never_blocks_the_one_behind_it() -> None:
    batch = [running(str(i), tpot=0.02) for i in range(30)]
    queue = [ask("strict", ttft=1, tpot=0.0145), ask("easy", ttft=5, tpot=0.5)]
    decision = decide(Scorpio(), NOW, queue, batch, engine())
    assert (admitted(decision), rejected(decision)) == (["easy"], [])


@pytest.mark.parametrize("busy", [False, True])
def test_a_hopeless_tpot_is_refused_at_once_even_behind_a_full_batch(busy: bool) -> None:
    batch = [running(str(i)) for i in range(4)] if busy else []
    (rejection,) = decide(Scorpio(), NOW, [ask(tpot=0.005)], batch, engine(max_num_seqs=4)).reject
    assert (rejection.bound, rejection.infeasible) == ("tpot", True)
    assert rejection.attainable_s == pytest.approx(1.3 * (TIMES.itl(1, 125)))


@pytest.mark.parametrize("asked", [0.3, 0.65, 0.8])
def test_a_refused_e2e_bound_is_answered_in_its_own_terms(asked: float) -> None:
    (rejection,) = decide(Scorpio(), NOW, [ask(e2e=asked, output=50)], [], engine()).reject
    assert rejection.bound == "e2e"
    assert rejection.attainable_s > asked
    again = ask(e2e=rejection.attainable_s * 1.001, output=50)
    following = decide(Scorpio(), NOW, [again], [], engine())
    assert admitted(following) or following.reject[0].attainable_s > rejection.attainable_s


def test_best_effort_is_neither_refused_nor_protected_nor_let_in_at_others_cost() -> None:
    greedy = ask("greedy", tpot=1e-6, ttft=1e-6, best_effort=True)
    assert admitted(decide(Scorpio(), NOW, [greedy], [], engine())) == ["greedy"]
    # Running, it holds nobody back ...
    assert admitted(
        decide(Scorpio(), NOW, [ask(tpot=0.05)], [running("g", tpot=1e-6, best_effort=True)], engine())
    ) == ["r"]
    # ... and waiting, it does not get in where a bound would break.
    full = [running(str(i), tpot=0.0155) for i in range(19)]
    assert (
        decide(Scorpio(), NOW, [greedy], full, engine(step_time=StepTimeModel(times=StepTimes(b=1e-4, d=0.0102))))
        == Decision()
    )
    assert greedy.tpot_slo_s == BEST_EFFORT_PACE_S


# --- switches, runway, sizes ------------------------------------------------------------------------------------------


def test_each_guard_can_be_switched_off() -> None:
    late, strict = ask("late", at=NOW - 9, ttft=1, tpot=1), ask("strict", at=NOW - 8, ttft=60, tpot=1e-3)
    both = decide(Scorpio(), NOW, [late, strict], [], engine())
    only_ttft = decide(Scorpio(tpot_guard=False), NOW, [late, strict], [], engine())
    only_tpot = decide(Scorpio(ttft_guard=False), NOW, [late, strict], [], engine())
    neither = decide(Scorpio(ttft_guard=False, tpot_guard=False), NOW, [strict, late], [], engine())
    assert sorted(rejected(both)) == ["late", "strict"]
    assert (admitted(only_ttft), rejected(only_ttft)) == (["strict"], ["late"])
    assert (admitted(only_tpot), rejected(only_tpot)) == (["late"], ["strict"])
    assert (admitted(neither), rejected(neither)) == (["late", "strict"], [])
    assert (Scorpio().gate, Scorpio(tpot_guard=False).gate) == ("credit", "open")


def test_the_engines_own_queue_is_kept_as_short_as_the_runway() -> None:
    state = engine(max_num_batched_tokens=100)
    queue = [ask(str(i), prompt=90) for i in range(5)]
    assert len(decide(Scorpio(prefill_lookahead_steps=2.0), NOW, queue, [], state).admit) == 2
    assert len(decide(Scorpio(prefill_lookahead_steps=4.0), NOW, queue, [], state).admit) == 4
    unfinished = [ask("old", admitted_s=NOW, prompt=150)]
    assert decide(Scorpio(), NOW, queue, unfinished, state).admit == []


def test_a_prompt_longer_than_the_runway_goes_when_the_runway_is_empty() -> None:
    state = engine(max_num_batched_tokens=100)
    assert admitted(decide(Scorpio(), NOW, [ask(prompt=5000)], [running()], state)) == ["r"]


def test_a_request_for_more_sequences_than_the_engine_holds_waits_for_an_empty_one() -> None:
    state = engine(max_num_seqs=4)
    assert decide(Scorpio(), NOW, [ask(sequences=8)], [running()], state).admit == []
    assert admitted(decide(Scorpio(), NOW, [ask(sequences=8)], [], state)) == ["r"]


REQUESTS = st.lists(
    st.builds(
        lambda number, at, ttft, tpot, e2e, prompt, output, sequences, best_effort: ask(
            f"w{number}", at=NOW - at, ttft=ttft, tpot=tpot, e2e=e2e, prompt=prompt, output=output,
            sequences=sequences, best_effort=best_effort,
        ),
        st.integers(0, 10**9), st.floats(0, 5), st.none() | st.floats(1e-6, 20), st.none() | st.floats(1e-6, 2),
        st.none() | st.floats(1e-6, 60), st.integers(1, 5000), st.floats(1, 3000), st.integers(1, 4), st.booleans(),
    ),
    max_size=12, unique_by=lambda r: r.id,
)  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@given(waiting=REQUESTS, old=RUNNING, seqs=st.integers(1, 20), flags=st.tuples(st.booleans(), st.booleans()))
def test_a_decision_is_a_function_of_what_is_shown_and_keeps_its_promises(
    name: str, waiting: list[Request], old: list[Request], seqs: int, flags: tuple[bool, bool]
) -> None:
    options = {"ttft_guard": flags[0], "tpot_guard": flags[1]} if name == "scorpio" else {}
    policy, state = make_policy(name, options), engine(max_num_seqs=seqs)
    before = copy.deepcopy([fields(r) for r in (*waiting, *old)])
    first, second = decide(policy, NOW, waiting, old, state), decide(policy, NOW, list(waiting), list(old), state)

    assert first == second
    assert [fields(r) for r in (*waiting, *old)] == before
    assert not set(admitted(first)) & set(rejected(first))
    assert set(admitted(first)) | set(rejected(first)) <= {r.id for r in waiting}
    assert len(set(admitted(first))) == len(first.admit)
    for rejection in first.reject:
        numbers = (rejection.predicted_s, rejection.attainable_s, rejection.retry_after_s)
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        asked = getattr(rejection.request.slo, f"{rejection.bound}_s")
        assert rejection.attainable_s >= asked * 0.999
    if name == "scorpio" and first.admit:
        size = len(old) + sum(r.sequences for r in first.admit)
        assert size <= max(seqs, first.admit[0].sequences if not old else 0)
        assert not any(r.request.best_effort for r in first.reject)


def fields(request: Request) -> list[Any]:
    return [getattr(request, name) for name in Request.__slots__]


def test_fcfs_admits_all_in_order_of_arrival_and_gates_nothing() -> None:
    queue = [ask("b", at=NOW - 1, ttft=1e-6), ask("a", at=NOW - 2), ask("c", tpot=1e-6)]
    decision = decide(Fcfs(), NOW, queue, [running()], engine(max_num_seqs=1))
    assert (admitted(decision), decision.reject, Fcfs().gate) == (["a", "b", "c"], [], "open")


def test_the_prefill_backlog_is_what_was_admitted_and_has_no_token_yet() -> None:
    assert prefill_backlog([ask(prompt=200), running(prompt=500), ask(prompt=100)], engine()) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("best", {}, "no policy is called 'best'; choose one of fcfs"),
        ("scorpio", {"etta": 1}, "has no option 'etta'; its options: eta,"),
        ("fcfs", {"eta": 1}, "its options: none"),
        ("scorpio", {"name": "x"}, "has no option 'name'"),
        ("slack", {"_granted": 1}, "has no option '_granted'; its options: cost_weight, max_wait_s,"),
        ("slack", {"fill": 0.0}, "fill must be above 0 and at most 1"),
        ("slack", {"memory_risk": 0}, "memory_risk must be between 0 and 1"),
        ("slack", {"memory_risk": 1}, "memory_risk must be between 0 and 1"),
        ("scorpio", {"eta": "much"}, "eta must be a number"),
        ("scorpio", {"eta": math.nan}, "eta must be a number"),
        ("scorpio", {"slack_s": -1}, "slack_s must be a number"),
        ("scorpio", {"eta": True}, "eta must be a number"),
        ("scorpio", {"ttft_guard": "yes"}, "ttft_guard must be true or false"),
    ],
)
def test_a_wrong_policy_or_option_is_refused_with_what_would_be_right(name: str, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match="^.*" + says.replace("(", r"\(")):
        make_policy(name, options)
