"""The slack policy: what runs keeps its pace, what waits can be on time, and thrift decides who goes first."""

from __future__ import annotations

from typing import Any

import pytest
from test_policies import NOW, TIMES, admitted, ask, decide, engine, rejected, running

from gateway.policies.slack import Slack, _cost, _Load

# TIMES: 10 ms a step and 0.1 ms a sequence; 100 prompt tokens take 0.1 s.


def slack(**options: Any) -> Slack:
    return Slack(**options)


def test_at_light_load_everybody_goes_at_once() -> None:
    queue = [ask("a", ttft=1, tpot=0.03), ask("b", ttft=2, tpot=0.05), ask("c")]
    decision = decide(slack(), NOW, queue, [], engine())
    assert (sorted(admitted(decision)), rejected(decision)) == (["a", "b", "c"], [])


def test_nobody_is_admitted_by_whom_a_running_requests_pace_would_break() -> None:
    def admits(strictest: float) -> bool:
        batch = [running(str(i), tpot=strictest) for i in range(20)]
        return bool(decide(slack(), NOW, [ask(tpot=1.0)], batch, engine()).admit)

    # 21 at 0.1 ms each on 10 ms, and a little for their context: about 12.4 ms. SCORPIO wants 1.3 times that.
    assert admits(0.013)
    assert not admits(0.0115)


def test_a_request_that_does_not_fit_now_never_blocks_the_one_behind_it() -> None:
    batch = [running(str(i), tpot=0.02) for i in range(30)]
    queue = [ask("strict", ttft=5, tpot=0.0125), ask("easy", ttft=9, tpot=0.5)]
    decision = decide(slack(), NOW, queue, batch, engine())
    assert (admitted(decision), rejected(decision)) == (["easy"], [])


def test_prefill_takes_longer_by_the_share_of_time_that_decodes_leave() -> None:
    # Alone: 0.1 s. With decodes that take half of the pace, twice that.
    idle = decide(slack(), NOW, [ask(ttft=0.12)], [], engine())
    batch = [running(str(i), tpot=0.025) for i in range(20)]
    busy = decide(slack(), NOW, [ask(ttft=0.12)], batch, engine())
    assert (rejected(idle), rejected(busy)) == ([], ["r"])
    assert busy.reject[0].predicted_s > 1.5 * 0.1


def test_whoever_waits_behind_work_that_takes_too_long_is_refused_and_told_what_would_do() -> None:
    queue = [ask(str(i), ttft=0.35, tpot=1.0, at=NOW + i * 1e-6) for i in range(6)]
    decision = decide(slack(optimism=1.0), NOW + 1e-5, queue, [], engine())
    assert rejected(decision) == ["3", "4", "5"]
    assert all(r.bound == "ttft" and r.attainable_s > 0.35 for r in decision.reject)


def test_under_pressure_the_requests_that_cost_least_go_first() -> None:
    state = engine(max_num_seqs=3)
    queue = [ask("long", ttft=5, tpot=1, output=900), ask("short", ttft=5.1, tpot=1, output=20, prompt=10),
             ask("middle", ttft=5.2, tpot=1, output=200)]  # fmt: skip
    assert admitted(decide(slack(), NOW, queue, [running("old")], state)) == ["short", "middle"]
    assert admitted(decide(slack(thrift=0.0), NOW, queue, [running("old")], state)) == ["long", "short"]


def test_a_request_without_a_bound_is_due_after_its_patience_and_is_never_refused() -> None:
    state = engine(max_num_seqs=2)
    fresh = [ask(str(i), ttft=5, tpot=1) for i in range(3)]
    for waited, first in ((0.0, "0"), (59.0, "patient")):
        queue = [ask("patient", at=NOW - waited), *fresh]
        decision = decide(slack(), NOW, queue, [running("old")], state)
        assert (admitted(decision), rejected(decision)) == ([first], [])


def test_a_pace_that_not_even_an_idle_engine_keeps_is_refused_at_once() -> None:
    (rejection,) = decide(slack(), NOW, [ask(tpot=0.005)], [], engine()).reject
    assert (rejection.bound, rejection.hopeless) == ("tpot", True)


def test_best_effort_is_not_refused_and_protects_nobody() -> None:
    greedy = ask("greedy", tpot=1e-6, ttft=1e-6, best_effort=True)
    assert admitted(decide(slack(), NOW, [greedy], [], engine())) == ["greedy"]
    beside = [running("g", tpot=1e-6, best_effort=True)]
    assert admitted(decide(slack(), NOW, [ask(tpot=0.05)], beside, engine())) == ["r"]


def test_the_load_of_a_batch_and_one_more_is_the_load_of_all() -> None:
    batch, one = [running(str(i), tpot=0.02 + i / 100) for i in range(5)], ask("one", tpot=0.01, sequences=2)
    together, apart = _Load.of([*batch, one]), _Load.of(batch).plus(one)
    assert (together.size, together.strictest) == (apart.size, apart.strictest)
    assert together.length == pytest.approx(apart.length)


def test_cost_grows_with_prompt_output_and_sequences() -> None:
    base = _cost(ask(), TIMES)
    for dearer in (ask(prompt=101), ask(output=51), ask(sequences=2)):
        assert _cost(dearer, TIMES) > base


def test_the_next_decision_is_due_when_a_waiting_request_would_become_too_late() -> None:
    decision = decide(slack(), NOW, [ask(ttft=1.0)], [], engine())
    assert decision.recheck_at == pytest.approx(NOW + 1.0 - 0.08)
