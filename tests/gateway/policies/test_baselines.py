"""The baselines as their papers have them: S3's order, Mooncake's early rejection, SCORPIO with one guard."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import EngineState
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import Decision, Policy
from gateway.policies.mooncake import Mooncake
from gateway.policies.registry import POLICIES, make_policy
from gateway.policies.s3 import S3
from gateway.policies.scorpio import Scorpio
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from gateway.requests.waiting_queue import WaitingQueue

TIMES = StepTimes(a=0.0, b=1e-3, c=1e-6, d=0.01, alpha=1e-3)
"""100 prompt tokens take 0.1 s; a step takes 10 ms, 1 ms for each sequence, and 1 ms for 1000 tokens of context."""

NOW = 100.0


def engine(**changes: Any) -> EngineState:
    return EngineState(**{"alive": True, "step_time": StepTimeModel(times=TIMES, learn=False), **changes})


def ask(name: str = "r", *, at: float = NOW, ttft: float | None = None, tpot: float | None = None,
        e2e: float | None = None, prompt: int = 100, output: float = 50, **more: Any) -> Request:  # fmt: skip
    return Request(name, "chat", at, Slo(ttft, tpot, e2e), prompt, output, **more)


def running(name: str = "old", **more: Any) -> Request:
    return ask(name, at=NOW - 1, **{"admitted_s": NOW - 1, "first_token_s": NOW - 0.5, "generated": 10, **more})


def decide(policy: Policy, waiting: list[Request], old: list[Request], state: EngineState | None = None) -> Decision:
    queue = WaitingQueue(policy.order)
    for request in waiting:
        queue.add(request)
    return policy.decide(NOW, queue, old, state or engine())


def admitted(decision: Decision) -> list[str]:
    return [request.id for request in decision.admit]


def rejected(decision: Decision) -> dict[str, tuple[str, bool]]:
    """Bound and hopelessness by request."""
    return {r.request.id: (r.bound, r.infeasible) for r in decision.reject}


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_s3_takes_the_shortest_predicted_output_first_and_among_equals_the_oldest() -> None:
    queue = [
        ask("long", output=90),
        ask("b", at=NOW - 1, output=5),
        ask("a", at=NOW - 2, output=5),
        ask("short", output=1),
    ]
    decision = decide(S3(), queue, [])
    assert (admitted(decision), decision.reject, decision.recheck_at) == (["short", "a", "b", "long"], [], None)


def test_s3_never_rejects_and_never_gates() -> None:
    late = [ask(str(i), at=NOW - 50, ttft=1e-6, tpot=1e-6) for i in range(3)]
    assert (len(decide(S3(), late, []).admit), S3().gate) == (3, "open")


def test_s3_stops_at_the_first_that_finds_no_place_in_the_batch() -> None:
    queue = [ask("pair", output=1, sequences=2), ask("single", output=2)]
    assert admitted(decide(S3(), queue, [running("a"), running("b", sequences=2)], engine(max_num_seqs=4))) == []
    assert admitted(decide(S3(), queue, [running("a")], engine(max_num_seqs=4))) == ["pair", "single"]
    assert admitted(decide(S3(), queue, [running("a")], engine(max_num_seqs=3))) == ["pair"]


def test_s3_stops_where_the_runway_ends_and_lets_nobody_pass() -> None:
    state = engine(max_num_batched_tokens=100)
    queue = [ask("a", prompt=90, output=1), ask("b", prompt=200, output=2), ask("c", prompt=5, output=3)]
    assert admitted(decide(S3(), queue, [], state)) == ["a"]
    assert admitted(decide(S3(prefill_lookahead_steps=3), queue, [], state)) == ["a", "b", "c"]
    unfinished = running("u", prompt=150, first_token_s=None, generated=0)
    assert admitted(decide(S3(), queue, [unfinished], state)) == []


def test_s3_admits_to_an_idle_engine_what_will_never_fit_better() -> None:
    state = engine(max_num_seqs=2, max_num_batched_tokens=100)
    assert admitted(decide(S3(), [ask(prompt=5000, sequences=8)], [], state)) == ["r"]


# --- Mooncake ---------------------------------------------------------------------------------------------------------


def test_mooncake_judges_in_order_of_arrival_each_behind_those_it_admitted() -> None:
    # Prefills end after 0.1, 0.2, 0.3 s; the third is too late, and leaves its time to the fourth.
    queue = [ask(name, at=NOW - 0.1 + i * 0.01, ttft=ttft) for i, (name, ttft) in
             enumerate([("a", 9), ("b", 9), ("c", 0.35), ("d", 0.4)])]  # fmt: skip
    decision = decide(Mooncake(), queue, [])
    assert admitted(decision) == ["a", "b", "d"]
    (rejection,) = decision.reject
    assert (rejection.request.id, rejection.bound, rejection.infeasible) == ("c", "ttft", False)
    assert rejection.predicted_s == rejection.attainable_s == pytest.approx(0.08 + 0.3)
    assert rejection.retry_after_s == pytest.approx(0.03), "by then so much of the backlog is done"


def test_mooncake_counts_admitted_prompts_without_a_token_and_the_time_already_waited() -> None:
    unfinished = running("u", prompt=300, first_token_s=None, generated=0)
    assert rejected(decide(Mooncake(), [ask(ttft=0.45)], [running(prompt=900)])) == {}
    assert rejected(decide(Mooncake(), [ask(ttft=0.35)], [unfinished])) == {"r": ("ttft", False)}
    assert rejected(decide(Mooncake(), [ask(at=NOW - 0.3, ttft=0.35)], [])) == {"r": ("ttft", False)}


def test_mooncake_rejects_who_would_decode_too_slowly_in_the_batch_it_joins() -> None:
    batch = [running(str(i), prompt=90) for i in range(9)]  # 100 tokens each
    decision = decide(Mooncake(), [ask(tpot=0.0201)], batch)
    # Ten sequences of 100 tokens and, half way, 25 more: 10 + 10 + 0.125 ms.
    (rejection,) = decision.reject
    assert (rejection.bound, rejection.infeasible) == ("tpot", False)
    assert rejection.predicted_s == rejection.attainable_s == pytest.approx(0.020125)
    assert admitted(decide(Mooncake(), [ask(tpot=0.0202)], batch)) == ["r"]
    assert admitted(decide(Mooncake(), [ask(tpot=0.0201)], batch[1:])) == ["r"]


def test_mooncakes_newcomers_fill_the_batch_for_those_behind_them() -> None:
    queue = [ask(str(i), at=NOW + i * 1e-6, tpot=0.0145) for i in range(6)]  # 11.125, 12.125, ... ms
    decision = decide(Mooncake(), queue, [])
    assert (admitted(decision), list(rejected(decision))) == (["0", "1", "2", "3"], ["4", "5"])
    # The mean length is theirs too: five of 100 tokens, and 25 more half way.
    assert decision.reject[0].predicted_s == pytest.approx(0.015125)


def test_mooncake_counts_every_sequence_of_a_request() -> None:
    pair = ask("pair", sequences=2, tpot=0.0122)
    (rejection,) = decide(Mooncake(), [pair], [running("old", prompt=90, generated=20, sequences=2)]).reject
    # Four sequences of 100 tokens on average, and 25 more half way.
    assert rejection.predicted_s == pytest.approx(0.014125)
    assert rejected(decide(Mooncake(), [pair], [])) == {}


def test_mooncake_protects_nobody_elses_bound() -> None:
    strict = [running(str(i), tpot=0.0115) for i in range(3)]
    assert admitted(decide(Mooncake(), [ask(tpot=1.0)], strict)) == ["r"]


def test_mooncake_says_when_asking_again_cannot_help() -> None:
    backlog = running("u", prompt=800, first_token_s=None, generated=0)
    queue = [ask("ttft", at=NOW - 1, ttft=0.09), ask("tpot", tpot=0.011), ask("late", ttft=0.5)]
    assert rejected(decide(Mooncake(), queue, [backlog])) == {
        "ttft": ("ttft", True),
        "tpot": ("tpot", True),
        "late": ("ttft", False),
    }


def test_mooncake_answers_an_end_to_end_bound_in_its_own_terms() -> None:
    (rejection,) = decide(Mooncake(), [ask(e2e=0.3)], []).reject
    assert (rejection.bound, rejection.infeasible) == ("e2e", True)
    # 0.1 s to the first token, and 50 tokens at 30 ms.
    assert rejection.attainable_s == pytest.approx(1.6)
    assert admitted(decide(Mooncake(), [ask(e2e=1.61)], [])) == ["r"]


def test_mooncake_without_its_tpot_check_is_what_scorpios_authors_ran() -> None:
    queue = [ask("slow", tpot=1e-6), ask("late", ttft=0.05)]
    assert rejected(decide(Mooncake(tpot_check=False), queue, [])) == {"late": ("ttft", True)}


def test_mooncake_serves_best_effort_whatever_its_bounds_were() -> None:
    request = ask(ttft=1e-6, tpot=1e-6, best_effort=True)
    batch = [running(str(i), sequences=500) for i in range(4)]
    assert admitted(decide(Mooncake(), [request], batch)) == ["r"]


def test_mooncake_decides_at_once_and_never_keeps_anybody_waiting() -> None:
    queue = [ask(str(i), ttft=0.3, tpot=0.013) for i in range(9)]
    decision = decide(Mooncake(), queue, [], engine(max_num_seqs=1, max_num_batched_tokens=1))
    assert len(decision.admit) + len(decision.reject) == 9
    assert (decision.recheck_at, Mooncake().gate) == (None, "open")


# --- one guard of SCORPIO ---------------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.builds(
        lambda at, ttft, tpot, prompt, output: ask(
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
def test_one_guard_alone_is_scorpio_with_the_other_switched_off(
    name: str, waiting: list[Request], old: list[Request]
) -> None:
    alone, switched = make_policy(name), make_policy("scorpio", SWITCHES[name])
    assert decide(alone, waiting, old) == decide(switched, waiting, old)
    assert [alone.order(r) for r in waiting] == [switched.order(r) for r in waiting]
    assert (alone.gate, alone.name) == (switched.gate, name)


def test_what_a_name_fixes_is_no_option_of_it_and_the_rest_is() -> None:
    for name, fixed in SWITCHES.items():
        with pytest.raises(ValueError, match=f"policy '{name}' has no option '{next(iter(fixed))}'"):
            make_policy(name, fixed)
        assert make_policy(name, {"eta": 1.1}) == Scorpio(eta=1.1, name=name, **fixed)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_goes_by_its_name_and_decides_nothing_when_nobody_waits(name: str) -> None:
    assert make_policy(name).name == name
    assert decide(make_policy(name), [], [running()]) == Decision()
