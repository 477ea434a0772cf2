"""The baselines of SCORPIO's evaluation: stock vLLM, S3, Mooncake, and SCORPIO with one guard."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import EngineState
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import Decision, Policy
from gateway.policies.fcfs import Fcfs
from gateway.policies.mooncake import Mooncake
from gateway.policies.registry import POLICIES, make_policy
from gateway.policies.s3 import S3
from gateway.policies.scorpio import Scorpio
from gateway.requests.request import Request
from tests.fixtures import policy_builders
from tests.fixtures.policy_builders import NOW, admitted, make_request, running

TIMES = StepTimes(a=0.0, b=1e-3, c=1e-6, d=0.01, alpha=1e-3)
"""100 prompt tokens take 0.1 s. A step takes 10 ms, 1 ms per sequence, and 1 ms per 1000 tokens of mean length."""


def engine(**changes: Any) -> EngineState:
    return policy_builders.engine(step_time=StepTimeModel(times=TIMES, learn=False), **changes)


def prefilling(prompt: int) -> Request:
    """An admitted request without its first token."""
    return make_request("prefilling", at=NOW - 1, admitted_s=NOW - 1, prompt=prompt)


def decide(policy: Policy, waiting: list[Request], old: list[Request], state: EngineState | None = None) -> Decision:
    return policy_builders.decide(policy, NOW, waiting, old, state or engine())


def rejected(decision: Decision) -> dict[str, tuple[str, bool]]:
    """By request id: the bound that fails, and whether it is infeasible."""
    return {r.request.id: (r.bound, r.infeasible) for r in decision.reject}


# --- FCFS -------------------------------------------------------------------------------------------------------------


def test_fcfs_admits_all_in_arrival_order_without_a_gate() -> None:
    queue = [make_request("b", at=NOW - 1, ttft=1e-6), make_request("a", at=NOW - 2), make_request("c", tpot=1e-6)]
    decision = decide(Fcfs(), queue, [running()], engine(max_num_seqs=1))
    assert (admitted(decision), decision.reject, Fcfs().gate) == (["a", "b", "c"], [], "open")


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_s3_orders_by_predicted_length_then_arrival() -> None:
    queue = [
        make_request("long", output=90),
        make_request("b", at=NOW - 1, output=5),
        make_request("a", at=NOW - 2, output=5),
        make_request("short", output=1),
    ]
    decision = decide(S3(), queue, [])
    assert (admitted(decision), decision.reject, decision.recheck_at) == (["short", "a", "b", "long"], [], None)


def test_s3_never_rejects_and_uses_no_gate() -> None:
    late = [make_request(str(i), at=NOW - 50, ttft=1e-6, tpot=1e-6) for i in range(3)]
    assert (len(decide(S3(), late, []).admit), S3().gate) == (3, "open")


def test_s3_stops_at_the_first_request_without_free_slots() -> None:
    queue = [make_request("pair", output=1, sequences=2), make_request("single", output=2)]
    assert admitted(decide(S3(), queue, [running("a"), running("b", sequences=2)], engine(max_num_seqs=4))) == []
    assert admitted(decide(S3(), queue, [running("a")], engine(max_num_seqs=4))) == ["pair", "single"]
    assert admitted(decide(S3(), queue, [running("a")], engine(max_num_seqs=3))) == ["pair"]


def test_s3_stops_at_the_first_request_beyond_the_prefill_lookahead() -> None:
    state = engine(max_num_batched_tokens=100)
    queue = [
        make_request("a", prompt=90, output=1),
        make_request("b", prompt=200, output=2),
        make_request("c", prompt=5, output=3),
    ]
    assert admitted(decide(S3(), queue, [], state)) == ["a"]
    assert admitted(decide(S3(prefill_lookahead_steps=3), queue, [], state)) == ["a", "b", "c"]
    assert admitted(decide(S3(), queue, [], engine(max_num_batched_tokens=100, reacts_late=True))) == ["a", "b", "c"]
    assert admitted(decide(S3(), queue, [prefilling(150)], state)) == []


def test_s3_admits_an_oversized_request_to_an_idle_engine() -> None:
    state = engine(max_num_seqs=2, max_num_batched_tokens=100)
    assert admitted(decide(S3(), [make_request(prompt=5000, sequences=8)], [], state)) == ["r"]


# --- Mooncake ---------------------------------------------------------------------------------------------------------


def test_mooncake_counts_admitted_prefills_before_each_request() -> None:
    # Prefills end after 0.1, 0.2 and 0.3 s. "c" is rejected, so its prefill does not delay "d".
    bounds = {"a": 9, "b": 9, "c": 0.35, "d": 0.4}
    queue = [make_request(name, at=NOW - 0.1 + i * 0.01, ttft=ttft) for i, (name, ttft) in enumerate(bounds.items())]
    decision = decide(Mooncake(), queue, [])
    assert admitted(decision) == ["a", "b", "d"]
    (rejection,) = decision.reject
    assert (rejection.request.id, rejection.bound, rejection.infeasible) == ("c", "ttft", False)
    assert rejection.predicted_s == rejection.attainable_s == pytest.approx(0.08 + 0.3)
    assert rejection.retry_after_s == pytest.approx(0.03), "the backlog is that much shorter by then"


def test_mooncake_ttft_includes_backlog_and_time_waited() -> None:
    assert rejected(decide(Mooncake(), [make_request(ttft=0.45)], [running(prompt=900)])) == {}
    assert rejected(decide(Mooncake(), [make_request(ttft=0.35)], [prefilling(300)])) == {"r": ("ttft", False)}
    assert rejected(decide(Mooncake(), [make_request(at=NOW - 0.3, ttft=0.35)], [])) == {"r": ("ttft", False)}


def test_mooncake_rejects_tpot_that_the_joined_batch_breaks() -> None:
    batch = [running(str(i), prompt=90) for i in range(9)]  # 100 tokens each
    decision = decide(Mooncake(), [make_request(tpot=0.0201)], batch)
    # Ten sequences with a mean length of 100 + 50/2 tokens: 10 + 10 + 0.125 ms.
    (rejection,) = decision.reject
    assert (rejection.bound, rejection.infeasible) == ("tpot", False)
    assert rejection.predicted_s == rejection.attainable_s == pytest.approx(0.020125)
    assert admitted(decide(Mooncake(), [make_request(tpot=0.0202)], batch)) == ["r"]
    assert admitted(decide(Mooncake(), [make_request(tpot=0.0201)], batch[1:])) == ["r"]


def test_mooncake_counts_admitted_requests_in_the_batch_of_the_next() -> None:
    queue = [make_request(str(i), at=NOW + i * 1e-6, tpot=0.0145) for i in range(6)]  # 11.125, 12.125, ... ms
    decision = decide(Mooncake(), queue, [])
    assert (admitted(decision), list(rejected(decision))) == (["0", "1", "2", "3"], ["4", "5"])
    # Five sequences with a mean length of 100 + 50/2 tokens.
    assert decision.reject[0].predicted_s == pytest.approx(0.015125)


def test_mooncake_counts_every_sequence_of_a_request() -> None:
    pair = make_request("pair", sequences=2, tpot=0.0122)
    (rejection,) = decide(Mooncake(), [pair], [running("old", prompt=90, generated=20, sequences=2)]).reject
    # Four sequences with a mean length of 100 + 50/2 tokens.
    assert rejection.predicted_s == pytest.approx(0.014125)
    assert rejected(decide(Mooncake(), [pair], [])) == {}


def test_mooncake_ignores_tpot_bounds_of_running_requests() -> None:
    strict = [running(str(i), tpot=0.0115) for i in range(3)]
    assert admitted(decide(Mooncake(), [make_request(tpot=1.0)], strict)) == ["r"]


def test_mooncake_marks_bounds_that_an_idle_engine_breaks_infeasible() -> None:
    queue = [
        make_request("ttft", at=NOW - 1, ttft=0.09),
        make_request("tpot", tpot=0.011),
        make_request("late", ttft=0.5),
    ]
    assert rejected(decide(Mooncake(), queue, [prefilling(800)])) == {
        "ttft": ("ttft", True),
        "tpot": ("tpot", True),
        "late": ("ttft", False),
    }


def test_mooncake_rejects_e2e_bound_with_an_attainable_e2e_bound() -> None:
    (rejection,) = decide(Mooncake(), [make_request(e2e=0.3)], []).reject
    assert (rejection.bound, rejection.infeasible) == ("e2e", True)
    # 0.1 s to the first token, and 50 tokens at 30 ms.
    assert rejection.attainable_s == pytest.approx(1.6)
    assert admitted(decide(Mooncake(), [make_request(e2e=1.61)], [])) == ["r"]


def test_mooncake_without_tpot_check_rejects_only_by_ttft() -> None:
    queue = [make_request("slow", tpot=1e-6), make_request("late", ttft=0.05)]
    assert rejected(decide(Mooncake(tpot_check=False), queue, [])) == {"late": ("ttft", True)}


def test_mooncake_admits_best_effort_whatever_its_bounds() -> None:
    request = make_request(ttft=1e-6, tpot=1e-6, bounds_waived=True)
    batch = [running(str(i), sequences=500) for i in range(4)]
    assert admitted(decide(Mooncake(), [request], batch)) == ["r"]


def test_mooncake_decides_every_waiting_request_at_once() -> None:
    queue = [make_request(str(i), ttft=0.3, tpot=0.013) for i in range(9)]
    decision = decide(Mooncake(), queue, [], engine(max_num_seqs=1, max_num_batched_tokens=1))
    assert len(decision.admit) + len(decision.reject) == 9
    assert (decision.recheck_at, Mooncake().gate) == (None, "open")


# --- SCORPIO with one guard -------------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.builds(
        lambda at, ttft, tpot, prompt, output: make_request(
            f"{at}/{ttft}/{prompt}/{output}", at=NOW - at, ttft=ttft, tpot=tpot, prompt=prompt, output=output
        ),
        st.floats(0, 3), st.none() | st.floats(0.01, 4), st.none() | st.floats(0.005, 0.1), st.integers(1, 900),
        st.integers(1, 400),
    ),
    max_size=10, unique_by=lambda r: r.id,
)  # fmt: skip
SWITCHES = {"ttft_guard_only": {"tpot_guard": False}, "tpot_guard_only": {"ttft_guard": False}}


@pytest.mark.parametrize("name", SWITCHES)
@given(waiting=REQUESTS, old=st.lists(st.builds(running, tpot=st.floats(0.01, 0.1)), max_size=12))
def test_one_guard_policy_equals_scorpio_with_the_other_guard_off(
    name: str, waiting: list[Request], old: list[Request]
) -> None:
    alone, switched = make_policy(name), make_policy("scorpio", SWITCHES[name])
    assert decide(alone, waiting, old) == decide(switched, waiting, old)
    assert [alone.order(r) for r in waiting] == [switched.order(r) for r in waiting]
    assert (alone.gate, alone.name) == (switched.gate, name)


@pytest.mark.parametrize("name", SWITCHES)
def test_one_guard_policy_takes_scorpio_options_but_not_its_switch(name: str) -> None:
    fixed = SWITCHES[name]
    with pytest.raises(ValueError, match=f"policy '{name}' has no option '{next(iter(fixed))}'"):
        make_policy(name, fixed)
    assert make_policy(name, {"eta": 1.1}) == Scorpio(eta=1.1, name=name, **fixed)


@pytest.mark.parametrize("name", POLICIES)
def test_policy_has_its_registered_name_and_ignores_an_empty_queue(name: str) -> None:
    assert make_policy(name).name == name
    assert decide(make_policy(name), [], [running()]) == Decision()
