"""Annealing: every request placed once, limits kept, as good as looking at every plan; and how it decides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.annealing.exact import best_plan
from gateway.policies.annealing.latency import Latency
from gateway.policies.annealing.policy import Annealing
from gateway.policies.annealing.search import STRAWMEN, Beside, Board, Job, Limits, Plan, anneal, deadline_order
from gateway.policies.registry import make_policy
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.placement import assign, load
from tests.fixtures.policy_builders import NOW, admitted, ask, decide, engine, rejected, running

LATENCY = Latency((1e-4, 0.0, 0.0, 5e-3), (1e-7, 1e-4, 0.0, 1e-2))

bounds = st.one_of(st.just(float("inf")), st.floats(0.01, 20.0))


@st.composite
def boards(draw: st.DrawFn, most: int = 8) -> Board:
    jobs = []
    for _ in range(draw(st.integers(1, most))):
        prompt, output = draw(st.integers(1, 500)), draw(st.integers(1, 500))
        prefill, decode = LATENCY.lines(prompt, output)
        jobs.append(
            Job(
                prefill,
                decode,
                draw(st.floats(0, 2)),
                draw(bounds),
                draw(bounds),
                draw(bounds),
                prompt + output,
                prompt,
            )
        )
    limits = Limits(draw(st.integers(1, 4)), draw(st.integers(500, 3000)), draw(st.integers(200, 1500)))
    busy = draw(st.integers(0, limits.slots))
    return Board(jobs, limits, Beside(busy, (0, 1, 2), 0.1, continuous=True) if busy else Beside())


def fresh(board: Board) -> Board:
    return Board(board.jobs, board.limits, board.beside)


def check(plan: Plan, board: Board) -> None:
    """Every job is placed exactly once, and no batch of two or more passes a limit."""
    assert sorted(i for batch in plan.batches for i in batch) == list(range(len(board.jobs)))
    for batch in plan.batches:
        jobs = [board.jobs[i] for i in batch]
        if len(jobs) > 1:
            assert len(jobs) <= board.limits.slots
            assert sum(job.kv for job in jobs) <= board.limits.kv
            assert sum(job.prompt for job in jobs) <= board.limits.prompt
    if board.beside.slots:
        assert board.beside.slots + len(plan.batches[0]) <= board.limits.slots


@given(boards(24), st.integers(1, 3000), st.integers(0, 5))
def test_every_request_is_placed_once_within_the_limits_and_the_same_seed_plans_the_same(
    board: Board, budget: int, seed: int
) -> None:
    plan = anneal(board, budget, seed)
    check(plan, board)
    assert anneal(fresh(board), budget, seed) == plan
    if plan.finished:
        others = [fresh(board).plan(fresh(board).filled(order(board.jobs))) for order in STRAWMEN.values()]
        # Of plans that lose more than they attain the quotient says nothing: slower would be better.
        assert max(plan.goal, 0.0) >= max(0.0, *(other.goal for other in others)) - 1e-9


@given(boards(8))
def test_with_few_requests_the_search_finds_the_best_plan_there_is(board: Board) -> None:
    found = Annealing(budget_ms=1e6).search(board)
    check(found, board)
    best = best_plan(fresh(board), prune=False)
    assert found.goal == pytest.approx(max(best.goal, 0.0) if best else 0.0, abs=1e-12) or found.attained <= 0


def every_plan(left: frozenset[int]) -> Iterator[list[int]]:
    """All sequences of batches, spelled out."""
    if not left:
        yield []
    members = sorted(left)
    for chosen in range(1, 1 << len(members)):
        batch = frozenset(m for at, m in enumerate(members) if chosen >> at & 1)
        for rest in every_plan(left - batch):
            yield [sum(1 << m for m in batch), *rest]


@given(boards(4))
def test_the_exhaustive_search_is_exhaustive(board: Board) -> None:
    idle = Board(board.jobs, board.limits)
    goals = []
    for masks in every_plan(frozenset(range(len(board.jobs)))):
        if all(idle.batch(mask).fits for mask in masks):
            attained, latency = idle.tally(masks)
            goals.append(attained / latency)
    best = best_plan(fresh(idle), prune=False)
    assert (best.goal if best else 0.0) == pytest.approx(max(goals))


@given(boards(16))
def test_what_a_plan_claims_follows_from_its_batches(board: Board) -> None:
    plan = anneal(board, 2000)
    start, latency = 0.0, 0.0
    for batch in plan.batches:
        jobs = [board.jobs[i] for i in batch]
        size = min(board.beside.slots + len(jobs), max(board.limits.slots, len(jobs)))
        ends = [sum(p * q for p, q in ((j.prefill[0], len(jobs)), (j.decode[0], size))) + j.prefill[1] + j.decode[1]
                for j in jobs]  # fmt: skip
        latency += sum(j.waited + end + start for j, end in zip(jobs, ends, strict=True))
        if not jobs:
            start += board.beside.turnover_s
        else:
            start += sum(ends) / len(ends) * len(jobs) / size if board.beside.continuous else max(ends)
    assert plan.latency_s == pytest.approx(latency)


def test_a_budget_that_is_gone_before_the_search_leaves_deadline_order() -> None:
    prefill, decode = LATENCY.lines(50, 50)
    jobs = [Job(prefill, decode, ttft_left=left) for left in (9.0, 1.0, 5.0, 3.0)]
    plan = anneal(Board(jobs, Limits(1)), 1)
    assert (plan.finished, [i for batch in plan.batches for i in batch]) == (False, deadline_order(jobs))
    assert deadline_order(jobs) == [1, 3, 2, 0]


def test_the_work_done_stays_close_to_the_budget() -> None:
    prefill, decode = LATENCY.lines(100, 100)
    jobs = [Job(prefill, decode, ttft_left=0.5 * i, waited=0.1 * i) for i in range(40)]
    for budget in (4000, 20_000):
        board = Board(jobs, Limits(4))
        anneal(board, budget)
        assert budget <= board.work <= 1.2 * budget


def test_long_code_yields_to_chat_that_would_be_late_behind_it() -> None:
    state = engine(max_num_seqs=1)
    code = ask("code", at=NOW - 0.2, e2e=60.0, output=500)
    chat = ask("chat", ttft=1.0, tpot=0.05, output=20)
    policy = Annealing()
    assert admitted(decide(policy, NOW, [code, chat], [], state)) == ["chat"]


def test_nobody_joins_whom_a_running_requests_pace_would_pay_for() -> None:
    # 10 ms a step, 0.1 ms a sequence, and the prefill of those that follow each: 54 ms with 20, 56 with 21.
    batch = [running(str(i), tpot=0.055) for i in range(20)]
    waits = [ask("patient", ttft=30.0, output=10)]
    assert admitted(decide(Annealing(), NOW, waits, batch, engine())) == []
    assert admitted(decide(Annealing(), NOW, waits, [running("easy", tpot=1.0)], engine())) == ["patient"]


def test_what_is_too_late_even_alone_is_refused_unless_told_otherwise() -> None:
    late = [ask("late", ttft=0.05, prompt=1000)]
    assert rejected(decide(Annealing(), NOW, late, [], engine())) == ["late"]
    assert admitted(decide(Annealing(reject=False), NOW, late, [], engine())) == ["late"]


def test_who_waited_beyond_patience_goes_first() -> None:
    old = ask("old", at=NOW - 100, output=900)
    short = [ask(f"s{i}", output=5) for i in range(3)]
    assert admitted(decide(Annealing(), NOW, [*short, old], [], engine(max_num_seqs=1)))[0] == "old"


def test_nothing_is_planned_again_until_something_changed() -> None:
    policy = Annealing()
    batch = [running(str(i), tpot=0.055) for i in range(20)]
    waits = [ask("patient", ttft=30.0, output=10)]
    state = engine()
    assert decide(policy, NOW, waits, batch, state).admit == []
    planned = policy._settled
    assert decide(policy, NOW + 0.01, waits, batch, state).admit == []
    assert policy._settled is planned or policy._settled == planned
    assert admitted(decide(policy, NOW + 0.02, waits, [], state)) == ["patient"]


@given(st.lists(st.floats(1, 2000), max_size=40), st.lists(st.floats(1000, 50_000), min_size=1, max_size=4))
def test_each_request_goes_where_the_most_memory_is_left(needs: list[float], left: list[float]) -> None:
    room = list(left)
    for need, chosen in zip(needs, assign(needs, left), strict=True):
        assert room[chosen] == max(room)
        room[chosen] -= need


def test_engines_of_a_gateway_are_compared_by_memory_left_under_annealing_alone() -> None:
    long_answer, long_prompt = ask("answer", prompt=10, output=800), ask("prompt", prompt=500, output=10)

    def loads(policy: str) -> list[tuple[float, int]]:
        engine_queues = [AdmissionController(make_policy(policy), engine()) for _ in range(2)]
        engine_queues[0].submit(long_answer)
        engine_queues[1].submit(long_prompt)
        return [load(engine_queue) for engine_queue in engine_queues]

    answer, prompt = loads("annealing")
    assert answer > prompt
    answer, prompt = loads("scorpio")
    assert answer < prompt


def test_assigning_to_no_engine_says_so() -> None:
    with pytest.raises(ValueError, match="no engine"):
        assign([1.0], [])


@given(st.integers(1, 8), st.integers(1, 1000), st.integers(1, 100))
def test_the_closed_form_is_the_sum_over_the_tokens(batch: int, prompt: int, output: int) -> None:
    prefill, decode = LATENCY.lines(prompt, output)
    assert prefill[0] * batch + prefill[1] == pytest.approx(1e-4 * batch * prompt + 5e-3)
    steps = sum(LATENCY.step_s(batch, prompt + k) for k in range(1, output + 1))
    assert decode[0] * batch + decode[1] == pytest.approx(steps)
