"""The slack policy: what runs keeps its pace, what waits can be on time, and thrift decides who goes first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import GateReport
from engine_adapter.gates.slack import PATIENT_S
from gateway.policies.base import Decision, Rejection, reject_ttft
from gateway.policies.slack.batch import E2E_EASE, NO_HURRY_S, Load, Queue
from gateway.policies.slack.fair_share import MOST_GROUPS, FairShare
from gateway.policies.slack.policy import Slack
from gateway.requests.progress import Progress
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController
from tests.fixtures.policy_builders import NOW, TIMES, admitted, ask, decide, engine, rejected, running

# TIMES: 10 ms a step and 0.1 ms a sequence; 100 prompt tokens take 0.1 s.


def refusal(request: Request) -> Rejection:
    return reject_ttft(request, 1.0, 1.0, 0.1, infeasible=False)


def slack(**options: Any) -> Slack:
    return Slack(**options)


def test_at_light_load_everybody_goes_at_once() -> None:
    queue = [ask("a", ttft=1, tpot=0.03), ask("b", ttft=2, tpot=0.05), ask("c")]
    decision = decide(slack(), NOW, queue, [], engine())
    assert (sorted(admitted(decision)), rejected(decision)) == (["a", "b", "c"], [])


def test_nobody_is_admitted_by_whom_a_running_requests_pace_would_break() -> None:
    def admits(strictest: float) -> bool:
        batch = [running(str(i), tpot=strictest, prompt=100, output=10_000) for i in range(20)]
        return bool(decide(slack(), NOW, [ask(tpot=1.0, prompt=5)], batch, engine()).admit)

    # 21 at 0.1 ms each on 10 ms, and a little for their context: 12.7 ms. SCORPIO wants 1.3 times that.
    assert admits(0.0131)
    assert not admits(0.0115)


def test_a_request_that_does_not_fit_now_never_blocks_the_one_behind_it() -> None:
    batch = [running(str(i), tpot=0.02, prompt=10, output=1000) for i in range(30)]
    queue = [ask("strict", ttft=5, tpot=0.0125), ask("easy", ttft=9, tpot=0.5)]
    decision = decide(slack(), NOW, queue, batch, engine())
    assert (admitted(decision), rejected(decision)) == (["easy"], [])


def test_prefill_takes_longer_by_the_share_of_time_that_decodes_leave() -> None:
    # Alone: 0.1 s. With decodes that take half of the pace, twice that.
    idle = decide(slack(queue_discount=0.8), NOW, [ask(ttft=0.12)], [], engine())
    batch = [running(str(i), tpot=0.025) for i in range(20)]
    busy = decide(slack(queue_discount=0.8), NOW, [ask(ttft=0.12)], batch, engine())
    assert (rejected(idle), rejected(busy)) == ([], ["r"])
    assert busy.reject[0].predicted_s > 1.5 * 0.1


def test_whoever_waits_behind_work_that_takes_too_long_is_refused_and_told_what_would_do() -> None:
    queue = [ask(str(i), ttft=0.35, tpot=1.0, at=NOW + i * 1e-6) for i in range(6)]
    decision = decide(slack(queue_discount=1.0), NOW + 1e-5, queue, [], engine())
    assert rejected(decision) == ["3", "4", "5"]
    assert all(r.bound == "ttft" and r.attainable_s > 0.35 for r in decision.reject)


def test_under_pressure_the_requests_that_cost_least_go_first() -> None:
    state = engine(max_num_seqs=3)
    queue = [ask("long", ttft=5, tpot=1, output=900), ask("short", ttft=5.1, tpot=1, output=20, prompt=10),
             ask("middle", ttft=5.2, tpot=1, output=200)]  # fmt: skip
    assert admitted(decide(slack(), NOW, queue, [running("old")], state)) == ["short", "middle"]
    assert admitted(decide(slack(cost_weight=0.0), NOW, queue, [running("old")], state)) == ["long", "short"]


def test_no_more_prompts_go_to_the_engine_than_two_steps_have_time_for() -> None:
    # A prompt token takes 1 ms. Of 40 ms a step takes 12.1: 28 tokens, and as many for the step after.
    batch = [running(str(i), tpot=0.04, output=1000) for i in range(20)]
    queue = [ask(str(i), ttft=5, tpot=1.0, prompt=10) for i in range(20)]
    assert len(decide(slack(), NOW, queue, batch, engine()).admit) == 5
    assert len(decide(slack(prefill_lookahead_steps=1.0), NOW, queue, batch, engine()).admit) == 2
    (long,) = decide(slack(), NOW, [ask("long", ttft=5, tpot=1.0, prompt=90)], batch, engine()).admit
    assert long.id == "long", "a prompt longer than that goes when nothing else is unprefilled"
    assert len(decide(slack(), NOW, queue, [], engine()).admit) == 20, "with no pace to keep, a step's worth is more"


def test_an_answer_of_whose_tokens_nothing_is_told_does_not_hold_the_runway() -> None:
    batch = [running(str(i), tpot=0.04, output=1000) for i in range(20)]
    queue = [ask(ttft=5, tpot=1.0, prompt=90)]
    whole = running("whole", tpot=1.0, prompt=400)
    whole.first_token_s = None
    assert not decide(slack(), NOW, queue, [*batch, whole], engine()).admit
    Progress(whole, lambda: None).on_unobserved()
    assert decide(slack(), NOW, queue, [*batch, whole], engine()).admit


def test_a_long_prompt_whose_turn_it_is_does_not_wait_for_a_runway_that_is_never_empty() -> None:
    batch = [running(str(i), tpot=0.04, output=1000) for i in range(20)]
    batch[-1].first_token_s = None  # the prompt of 100 tokens lies in the engine
    long, refused = ask("long", ttft=20, tpot=1.0, prompt=900), ask("refused")
    long.slo_class = refused.slo_class = "documents"
    short = [ask(str(i), ttft=2, tpot=1.0, prompt=5, at=NOW - 1) for i in range(3)]
    wide = {"prefill_lookahead_steps": 4.0}  # 110 tokens
    assert "long" not in admitted(decide(slack(**wide), NOW, [*short, long], batch, engine()))
    policy = slack(**wide)
    for _ in range(60):
        policy._granted.note(Decision(admit=[ask()], reject=[refusal(refused)]))
    assert admitted(decide(policy, NOW, [*short, long], batch, engine()))[0] == "long", "its class is behind"
    paced = ask("paced", tpot=1.0, prompt=900)
    later = NOW + 61
    short = [ask(str(i), ttft=2, tpot=1.0, prompt=5, at=later) for i in range(3)]
    assert admitted(decide(slack(**wide), later, [*short, paced], batch, engine()))[0] == "paced", "out of patience"


def test_while_others_prompts_wait_a_step_takes_the_pace() -> None:
    # 0.1 s of prompt beside 12 ms of 100 ms. Alone it needs one step of each; in a crowd, steps are full.
    batch = [running(str(i), tpot=0.1, output=1000) for i in range(20)]
    load = Load.of(batch, 0.01)
    assert load.prefilled_in_s(0.0, 100.0, 0.0, engine()) == pytest.approx(0.0124 + 0.1 / 0.876, rel=0.01)
    assert load.prefilled_in_s(0.0, 100.0, 900.0, engine()) == pytest.approx(0.1 + 0.1 / 0.876, rel=0.01)
    assert load.prefilled_in_s(50.0, 100.0, 0.0, engine()) == pytest.approx(0.0624 + 0.15 / 0.876, rel=0.01)


def test_a_request_with_a_pace_but_no_deadline_is_due_after_its_patience() -> None:
    state = engine(max_num_seqs=2)
    fresh = [ask(str(i), ttft=5, tpot=1) for i in range(3)]
    for waited, first in ((0.0, "0"), (59.0, "patient")):
        queue = [ask("patient", tpot=1, at=NOW - waited), *fresh]
        decision = decide(slack(), NOW, queue, [running("old")], state)
        assert (admitted(decision), rejected(decision)) == ([first], [])


def test_nothing_is_admitted_that_would_probably_outgrow_the_kv_memory() -> None:
    def admits(tokens: float, p90: float, kv_tokens: int = 1600) -> int:
        queue = [ask(str(i), ttft=5, tpot=1, output=tokens, predicted_p90=p90) for i in range(10)]
        return len(decide(slack(), NOW, queue, [], engine(kv_tokens=kv_tokens)).admit)

    # 100 tokens of prompt and 100 of output each: eight of them would fit, if that were certain.
    assert admits(100, 100) == 8
    assert admits(100, 200) == 5
    assert admits(100, 200, kv_tokens=0) == 10, "an engine that does not say how much it has"
    assert admits(5000, 9000) == 1, "one always goes: the engine itself refuses what it cannot hold"


def test_a_pace_that_not_even_an_idle_engine_keeps_is_refused_at_once() -> None:
    (rejection,) = decide(slack(), NOW, [ask(tpot=0.005)], [], engine()).reject
    assert (rejection.bound, rejection.infeasible) == ("tpot", True)


REQUESTS = st.builds(
    lambda i, prompt, output, more, tpot, sequences, generated, effort: ask(
        str(i), prompt=prompt, output=output, predicted_p90=output + more, tpot=tpot, sequences=sequences,
        generated=generated * sequences, best_effort=effort,
    ),
    st.integers(), st.integers(1, 4000), st.integers(1, 2000), st.integers(0, 500), st.none() | st.floats(0.005, 3),
    st.integers(1, 4), st.integers(0, 2500), st.booleans(),
)  # fmt: skip


@given(st.lists(REQUESTS, max_size=8), REQUESTS)
def test_the_load_of_a_batch_and_one_more_is_the_load_of_all(batch: list[Request], one: Request) -> None:
    state = engine(max_num_seqs=60, gate=GateReport(preemptible=True))
    together, apart = Load.of([*batch, one], 0.01, state), Load.of(batch, 0.01, state)
    apart.take(apart.plus(one, one.pace_after(NOW)))
    for name in Load.__slots__:
        assert getattr(together, name) == pytest.approx(getattr(apart, name)), name


@given(st.lists(REQUESTS, max_size=5), st.lists(REQUESTS, min_size=1, max_size=5), st.floats(0.5, 1),
       st.floats(0, 5), st.integers(500, 20_000), st.integers(0, 500), st.booleans())  # fmt: skip
def test_the_columns_say_of_each_request_what_the_load_says_with_it(
    batch: list[Request],
    queue: list[Request],
    share: float,
    within_s: float,
    kv_tokens: int,
    prompts: int,
    preemptible: bool,
) -> None:
    for request in queue:
        request.generated = 0  # nothing that waits has begun
    state = engine(kv_tokens=kv_tokens, max_num_seqs=40, gate=GateReport(preemptible=preemptible))
    load = Load.of(batch, 0.01, state)
    total = sum(request.prompt_tokens for request in queue)
    columns = Queue.of(queue, 1e-3, 60.0, share)
    of_all = columns.holds_with(load, prompts, np.full(len(queue), within_s), state)
    for request, pace_s, holds in zip(queue, columns.tpot_s.tolist(), of_all.tolist(), strict=True):
        more, others = load.plus(request, pace_s), total - request.prompt_tokens
        taken = more.without_who_makes_way() if pace_s < np.inf else more
        ways = (
            more.step_s(state) / more.strictest,
            more.prefilled_in_s(prompts, request.prompt_tokens, others, state) / max(within_s, 1e-9),
            (taken.memory + more.z * more.variance**0.5) / kv_tokens,
        )
        if all(abs(way - 1) > 1e-6 for way in ways):
            assert holds == all(way < 1 for way in ways)


WAITING = st.builds(
    lambda ago, ttft, tpot, e2e, prompt, output, more, effort: ask(
        at=NOW - ago, ttft=ttft, tpot=tpot, e2e=e2e, prompt=prompt, output=output, predicted_p90=output + more,
        best_effort=effort,
    ),
    st.floats(0, 2), st.none() | st.floats(0.1, 9), st.none() | st.floats(0.009, 3), st.none() | st.floats(1, 60),
    st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 500), st.booleans(),
)  # fmt: skip


@given(st.lists(WAITING, max_size=12), st.lists(WAITING, max_size=6), st.lists(REQUESTS, max_size=6), st.booleans(),
       st.sampled_from([1.0, 0.9]), st.sampled_from([0, 6000]))  # fmt: skip
def test_a_queue_that_keeps_columns_is_decided_on_as_a_plain_list_is(
    first: list[Request],
    later: list[Request],
    batch: list[Request],
    best_effort: bool,
    tpot_target_fraction: float,
    kv_tokens: int,
) -> None:
    for number, request in enumerate([*first, *later, *batch]):
        request.id = str(number)
    policy, plain, moving = (slack(tpot_target_fraction=tpot_target_fraction, max_wait_s=1.0) for _ in range(3))
    books = AdmissionController(moving, engine(max_num_seqs=12, kv_tokens=kv_tokens), lambda request: best_effort)
    books.running = {request.id: request for request in batch}
    for now, came in ((NOW, first), (NOW + 0.5, later), (NOW + 1.5, [])):
        for request in came:
            books.submit(request)
        listed = plain.decide(now, list(books.waiting), list(books.running.values()), books.engine)
        kept = policy.decide(now, books.waiting, list(books.running.values()), books.engine)
        assert kept == listed
        books.decide(now)  # so that the queue changes


@given(st.lists(WAITING, min_size=1, max_size=6), st.lists(REQUESTS, max_size=6), st.sampled_from([1.0, 0.9]),
       st.integers(0, 3000))  # fmt: skip
def test_the_paces_that_ends_leave_are_those_that_each_request_says(
    asked: list[Request], batch: list[Request], share: float, prompts: int
) -> None:
    load, state = Load.of(batch, 0.01), engine()
    queue = Queue.of(asked, 1e-3, 60.0, share)
    before = queue.tpot_s.tolist()
    queue.pace_ends(NOW, load, prompts, share, state)
    fixed_s = load.prefilled_in_s(prompts, 0.0, 0.0, state)
    token_s = load.prefilled_in_s(prompts, 1.0, 0.0, state) - fixed_s if fixed_s < math.inf else math.inf
    for at, request in enumerate(asked):
        paces = before[at], before[at]
        if request.slo.e2e_s is not None and not request.best_effort:
            first_s = min(NOW + fixed_s + token_s * request.prompt_tokens, request.deadline_s)
            paces = tuple(min(share * request.pace_after(first_s, ease), 0.9 * PATIENT_S) for ease in (1.0, E2E_EASE))
        assert (queue.tpot_s[at], queue.eased_s[at]) == paces


@given(st.lists(REQUESTS, max_size=6), st.lists(REQUESTS, max_size=6), REQUESTS, st.integers(1, 8))
def test_a_newcomer_that_does_not_fit_is_not_let_in(
    batch: list[Request], queue: list[Request], newcomer: Request, slots: int
) -> None:
    for number, request in enumerate([*batch, *queue, newcomer]):
        request.id = str(number)
    for request in batch:
        request.admitted_s = NOW
        request.first_token_s = NOW if request.generated else None
    for request in (*queue, newcomer):
        request.generated = 0
    policy, state = slack(), engine(max_num_seqs=slots)
    decision = decide(policy, NOW, queue, batch, state)
    if not decision.fits(newcomer):
        left = [r for r in queue if r not in decision.admit and r.id not in rejected(decision)]
        for request in decision.admit:
            request.admitted_s = NOW
        later = decide(policy, NOW, [*left, newcomer], [*batch, *decision.admit], state)
        assert newcomer.id not in admitted(later)


def test_a_newcomer_is_worth_a_decision_if_it_could_go() -> None:
    state, newcomer = engine(max_num_batched_tokens=512), ask("new", ttft=9, prompt=100)
    assert decide(slack(), NOW, [ask("1", ttft=9, prompt=900)], [], state).fits(newcomer)
    assert not decide(slack(), NOW, [ask("1", ttft=9, prompt=1100)], [], state).fits(newcomer), "no more prompts"
    assert not decide(slack(), NOW, [ask("1", ttft=9)], [running()], engine(max_num_seqs=1)).fits(newcomer), "no place"
    # 21 at 0.1 ms each on 10 ms, and a little for their context: 12.7 ms.
    batch = [running(str(i), tpot=0.013, output=10_000) for i in range(20)]
    decision = decide(slack(), NOW, [ask("1", ttft=0.01)], batch, engine())
    assert decision.fits(ask("new", ttft=9, tpot=0.5, prompt=5))
    assert not decision.fits(ask("new", ttft=9, tpot=0.0115, prompt=5)), "it could not keep its pace"
    assert decision.fits(ask("new")), "what nothing bounds needs a place only"


def test_answers_are_paced_by_the_share_of_their_bounds_that_is_to_be_filled() -> None:
    asked = [ask("a", ttft=9, tpot=0.05), ask("b", ttft=9), ask("c", ttft=9, tpot=0.05, e2e=50.0), ask("d", tpot=1.0)]
    assert "a" not in decide(slack(), NOW, asked, [running("old")], engine()).paces
    paces = decide(slack(tpot_target_fraction=0.98), NOW, asked, [running("old")], engine()).paces
    asked_for = {"a": pytest.approx(0.049), "c": pytest.approx(0.049), "b": NO_HURRY_S}
    assert paces == asked_for, "a second a token is no pace, and its bound is told as it is"


def test_cost_grows_with_prompt_output_and_sequences() -> None:
    queue = [ask(), ask(prompt=101), ask(output=51), ask(sequences=2)]
    base, *dearer = Queue.of(queue, 1e-3, 60.0).cost_s(1e-3, 1e-3, 1e-6)
    assert base == pytest.approx(0.15 + 1e-6 * 50 * 125)
    assert np.all(np.array(dearer) > base)


def test_several_sequences_of_a_request_bring_one_prompt() -> None:
    one, four = (Load.of([running("r", tpot=0.1, prompt=400, output=100, sequences=n)], 0.01) for n in (1, 4))
    assert four.decoding == 4 * one.decoding
    single, several = Queue.of([ask(prompt=400), ask(prompt=400, sequences=4)], 1e-3, 60.0).cost_s(1e-3, 1e-3, 0.0)
    assert (single, several) == (pytest.approx(0.45), pytest.approx(0.4 + 4 * 0.05))


def test_refusing_in_one_sweep_is_refusing_one_by_one() -> None:
    # Every third has a prompt that only fits when those refused before it are out of the way.
    queue = [ask(f"{i:02}", ttft=0.2 + 0.05 * i, tpot=1.0, prompt=900 if i % 3 == 0 else 60) for i in range(30)]
    decision = decide(slack(queue_discount=1.0), NOW, queue, [], engine())
    ahead, late = 0.0, []
    for request in queue:
        own = TIMES.alpha * request.prompt_tokens
        if TIMES.beta + ahead + own > request.ttft_slo_s:
            late.append(request.id)
        else:
            ahead += own
    assert rejected(decision) == late
    assert 5 < len(late) < 30


# --- the floor --------------------------------------------------------------------------------------------------------


def test_a_tenant_that_thrift_turns_away_gets_its_share_all_the_same() -> None:
    def shares(min_admission_share: float) -> tuple[float, float]:
        """Admission rates of a cheap and of a dear tenant that ask in turn for the one place there is."""
        policy, state = slack(min_admission_share=min_admission_share), engine(max_num_seqs=1)
        asked, got = {"cheap": 0, "dear": 0}, {"cheap": 0, "dear": 0}
        for turn in range(600):
            queue = [
                ask(f"{turn} {tenant}", ttft=0.5, tpot=1, at=NOW + turn, output=output, tenant=tenant)
                for tenant, output in (("cheap", 20), ("dear", 900))
            ]
            decision = decide(policy, NOW + turn, queue, [], state)
            late = decide(policy, NOW + turn + 1, [r for r in queue if r not in decision.admit], [], state)
            assert len(late.reject) == 1
            for request in queue:
                asked[request.tenant] += 1
                got[request.tenant] += request in decision.admit
        return got["cheap"] / asked["cheap"], got["dear"] / asked["dear"]

    cheap, dear = shares(min_admission_share=0.0)
    assert (cheap, dear) == (1.0, 0.0)
    cheap, dear = shares(min_admission_share=0.5)
    assert dear == pytest.approx(0.5 * (cheap + dear) / 2, abs=0.02)


def test_what_is_hopeless_or_best_effort_is_nothing_to_be_fair_about() -> None:
    policy = slack()
    decide(policy, NOW, [ask("h", tpot=0.001), ask("b", best_effort=True)], [], engine())
    assert policy._granted == FairShare(policy.min_admission_share)


def test_the_floor_remembers_a_bounded_number_of_groups_and_stays_finite() -> None:
    policy = slack()
    for turn in range(MOST_GROUPS + 200):
        decide(policy, NOW, [ask(tenant=f"t{turn}")], [], engine())
    min_admission_share = policy._granted
    assert len(min_admission_share._tenants) == MOST_GROUPS
    min_admission_share._weight = 1e9
    decide(policy, NOW, [ask(tenant="last")], [], engine())
    assert min_admission_share._weight == 1.0
    assert min_admission_share._all.share == 1.0
    assert min_admission_share._tenants["last"].decided == pytest.approx(1.0)


def test_the_next_decision_is_due_when_a_waiting_request_would_become_too_late() -> None:
    decision = decide(slack(), NOW, [ask(ttft=1.0)], [], engine())
    assert decision.recheck_at == pytest.approx(NOW + 1.0 - 0.11, abs=1e-3)


def test_an_idle_engine_takes_one_whatever_may_come_after_it() -> None:
    assert admitted(decide(slack(), NOW, [ask(ttft=9, tpot=0.03, prompt=800, output=1)], [], engine())) == ["r"]


def test_nobody_is_let_in_whose_prompt_would_be_late_beside_those_who_run() -> None:
    # Decodes take 12.4 of 14 ms: a tenth of the time is left, in which 20 tokens of prompt take 0.2 s.
    batch = [running(str(i), tpot=0.014, prompt=100, output=10_000) for i in range(20)]
    for ttft, gone in ((0.19, []), (0.3, ["r"])):
        decision = decide(
            slack(queue_discount=0.1), NOW, [ask(ttft=ttft, tpot=1, prompt=20, output=1000)], batch, engine()
        )
        assert (admitted(decision), rejected(decision)) == (gone, [])


def test_what_is_left_of_an_end_to_end_bound_after_the_first_token_is_for_the_others() -> None:
    request = ask(e2e=4.0, output=100, prompt=100)
    books = AdmissionController(slack(), engine())
    books.submit(request)
    planned = request.tpot_slo_s
    assert [r.id for r in books.decide(NOW + 0.5).admit] == ["r"]
    left_s = (4.0 - 0.5 - 0.1) / 100  # half a second is over, the prompt takes 0.1 s
    assert request.tpot_slo_s == pytest.approx(E2E_EASE * left_s, rel=1e-3)
    assert planned is not None
    assert request.tpot_slo_s > planned


def test_an_end_to_end_bound_asks_for_its_pace_at_the_door_and_holds_nobody_up_for_it_later() -> None:
    # 21 decode in 12.6 ms, 25 in 13.1.
    batch = [running(str(i), tpot=1.0, prompt=100, output=10_000) for i in range(20)]
    for left_ms, gone in ((12.4, []), (12.8, ["r"])):
        asked = ask(e2e=left_ms, output=1000, prompt=5)
        assert admitted(decide(slack(), NOW, [asked], batch, engine())) == gone
    behind = [ask(str(i), ttft=60, tpot=1.0, output=1000, prompt=5) for i in range(4)]
    assert admitted(decide(slack(), NOW, [asked, *behind], batch, engine())) == ["r", "0", "1", "2", "3"]
    strict = [ask("r", ttft=6, tpot=0.0128, output=1000, prompt=5), *behind]
    assert len(admitted(decide(slack(), NOW, strict, batch, engine()))) < 5


def test_a_bound_on_the_pace_is_kept_beside_an_end_to_end_bound() -> None:
    books = AdmissionController(slack(), engine())
    books.submit(request := ask(e2e=4.0, tpot=0.04, output=100, prompt=100))
    assert [r.id for r in books.decide(NOW).admit] == ["r"]
    assert request.tpot_slo_s == 0.04


def test_a_plan_for_an_end_to_end_bound_never_ends_after_it() -> None:
    # 25 who decode for 12.5 of 13 ms: prefill gets a twenty-fifth of the time.
    batch = [running(str(i), tpot=0.0131, prompt=10, output=10_000) for i in range(25)]
    request = ask(e2e=20.0, output=100, prompt=100)
    queue = Queue.of([request], 1e-3, 60.0)
    queue.pace_ends(NOW, Load.of(batch, 0.01), 0, 1.0, engine())
    assert queue.tpot_s[0] * 100 + 2.0 < 20.0, "the prompt will take two seconds at least"
    assert queue.tpot_s[0] * 100 + request.ttft_slo_s >= 20.0 - 1e-6 or queue.tpot_s[0] == pytest.approx(0.9)


def test_an_end_far_away_still_leaves_a_pace() -> None:
    queue = Queue.of([ask(e2e=100.0, output=8)], 1e-3, 60.0)
    queue.pace_ends(NOW, Load(), 0, 1.0, engine())
    assert queue.tpot_s[0] < PATIENT_S


def test_a_pace_that_only_an_empty_engine_would_keep_is_not_waited_for() -> None:
    # Alone a step takes 10.1 ms and a little; with 2% to spare, that is more than 10.2.
    (rejection,) = decide(slack(tpot_target_fraction=0.98), NOW, [ask(tpot=0.0102)], [running("old")], engine()).reject
    assert (rejection.bound, rejection.infeasible) == ("tpot", True)
    again = ask(tpot=rejection.attainable_s)
    assert rejected(decide(slack(tpot_target_fraction=0.98), NOW, [again], [], engine())) == []


def test_the_pace_of_an_end_to_end_bound_is_never_looser_than_a_bound_on_the_pace() -> None:
    assert ask(e2e=4.0, tpot=0.02, output=100).pace_after(NOW) == 0.02
    assert ask(e2e=1.0, tpot=0.02, output=100).pace_after(NOW) == pytest.approx(0.01)
    assert ask(e2e=1.0, output=100).pace_after(NOW + 2) == 0.0
    assert ask(e2e=1.0, output=100, best_effort=True).pace_after(NOW) == np.inf
    assert ask(ttft=1.0).pace_after(NOW) == np.inf


def test_what_was_decided_stands_for_a_step_at_most_and_until_but_one_chunk_lies_ahead() -> None:
    # A step of 30 ms has time for some 20 prompt tokens beside the one that decodes.
    waits, decoding = ask("waits", ttft=5, tpot=0.1), running(tpot=0.03)
    full = engine(max_num_seqs=1)
    assert decide(slack(), NOW, [waits], [decoding], full).stands_s == pytest.approx(0.0101, rel=0.01)
    full = engine(max_num_seqs=2)
    for tokens, stood in ((10, 0.0202), (20, 0.0), (30, 0.015), (40, 0.03), (900, 0.03)):
        ahead = ask("ahead", tpot=0.03, prompt=tokens, admitted_s=NOW)
        decision = decide(slack(), NOW, [waits], [decoding, ahead], full)
        assert (decision.admit, decision.stands_s) == ([], pytest.approx(stood, abs=0.001))
