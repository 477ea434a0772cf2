"""The annealing policy: valid plans, the best plan for a few jobs, work within the budget, and its decisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.annealing.exact import best_plan
from gateway.policies.annealing.latency import Latency
from gateway.policies.annealing.plan import (
    START_ORDERS,
    Job,
    Limits,
    Plan,
    Problem,
    RunningSet,
    deadline_order,
)
from gateway.policies.annealing.policy import Annealing
from gateway.policies.annealing.search import anneal
from tests.fixtures.policy_builders import NOW, admitted, decide, engine, make_request, rejected, running

LATENCY = Latency((1e-4, 0.0, 0.0, 5e-3), (1e-7, 1e-4, 0.0, 1e-2))

BOUNDS = st.one_of(st.just(float("inf")), st.floats(0.01, 20.0))


@st.composite
def problems(draw: st.DrawFn, max_jobs: int = 8) -> Problem:
    jobs = []
    for _ in range(draw(st.integers(1, max_jobs))):
        prompt, output = draw(st.integers(1, 500)), draw(st.integers(1, 500))
        prefill, decode = LATENCY.lines(prompt, output, prompt)
        waited = draw(st.floats(0, 2))
        bounds = (draw(BOUNDS), draw(BOUNDS), draw(BOUNDS))
        jobs.append(Job(prefill, decode, waited, *bounds, kv=prompt + output, prompt=prompt))
    limits = Limits(draw(st.integers(1, 4)), draw(st.integers(500, 3000)), draw(st.integers(200, 1500)))
    busy = draw(st.integers(0, limits.slots))
    return Problem(jobs, limits, RunningSet(busy, (0, 1, 2), 0.1, continuous=True) if busy else RunningSet())


def fresh(problem: Problem) -> Problem:
    """The same problem with no work done."""
    return Problem(problem.jobs, problem.limits, problem.running)


def assert_valid(plan: Plan, problem: Problem) -> None:
    """Every job is in exactly one batch, and no batch of two or more jobs exceeds a limit."""
    assert sorted(i for batch in plan.batches for i in batch) == list(range(len(problem.jobs)))
    for batch in plan.batches:
        jobs = [problem.jobs[i] for i in batch]
        if len(jobs) > 1:
            assert len(jobs) <= problem.limits.slots
            assert sum(job.kv for job in jobs) <= problem.limits.kv
            assert sum(job.prompt for job in jobs) <= problem.limits.prompt
    if problem.running.slots:
        assert problem.running.slots + len(plan.batches[0]) <= problem.limits.slots


# --- search -----------------------------------------------------------------------------------------------------------


@given(problems(24), st.integers(1, 3000), st.integers(0, 5))
def test_anneal_returns_a_valid_plan_no_worse_than_its_starts(problem: Problem, budget: int, seed: int) -> None:
    plan = anneal(problem, budget, seed)
    assert_valid(plan, problem)
    if plan.finished:
        starts = [fresh(problem).plan(fresh(problem).fill(order(problem.jobs))) for order in START_ORDERS.values()]
        # G ranks plans only where it is positive: with a negative n, more latency would be better.
        assert max(plan.objective, 0.0) >= max(0.0, *(start.objective for start in starts)) - 1e-9


@given(problems(24), st.integers(1, 3000), st.integers(0, 5))
def test_anneal_is_deterministic_for_a_seed(problem: Problem, budget: int, seed: int) -> None:
    assert anneal(problem, budget, seed) == anneal(fresh(problem), budget, seed)


@given(problems(8))
def test_search_finds_the_best_plan_of_up_to_eight_jobs(problem: Problem) -> None:
    found = Annealing(budget_ms=1e6).search(problem)
    assert_valid(found, problem)
    best = best_plan(fresh(problem), prune=False)
    assert found.objective == pytest.approx(max(best.objective, 0.0) if best else 0.0, abs=1e-12) or found.attained <= 0


def every_plan(left: frozenset[int]) -> Iterator[list[int]]:
    """All sequences of batches, as masks."""
    if not left:
        yield []
    jobs = sorted(left)
    for chosen in range(1, 1 << len(jobs)):
        batch = frozenset(job for at, job in enumerate(jobs) if chosen >> at & 1)
        for rest in every_plan(left - batch):
            yield [sum(1 << job for job in batch), *rest]


@given(problems(4))
def test_best_plan_equals_enumeration_of_all_plans(problem: Problem) -> None:
    idle = Problem(problem.jobs, problem.limits)
    objectives = []
    for masks in every_plan(frozenset(range(len(problem.jobs)))):
        if all(idle.batch(mask).fits for mask in masks):
            attained, latency_s = idle.evaluate(masks)
            objectives.append(attained / latency_s)
    best = best_plan(fresh(idle), prune=False)
    assert (best.objective if best else 0.0) == pytest.approx(max(objectives))


@given(problems(16))
def test_plan_latency_follows_from_its_batches(problem: Problem) -> None:
    plan, slots = anneal(problem, 2000), problem.running.slots
    start, latency_s = 0.0, 0.0
    for batch in plan.batches:
        jobs = [problem.jobs[i] for i in batch]
        size = min(slots + len(jobs), max(problem.limits.slots, len(jobs)))
        prefills = [job.prefill[0] * len(jobs) + job.prefill[1] for job in jobs]
        ends = [first + job.decode[0] * size + job.decode[1] for first, job in zip(prefills, jobs, strict=True)]
        latency_s += sum(job.waited + end + start for job, end in zip(jobs, ends, strict=True))
        if not jobs:
            start += problem.running.turnover_s
        else:
            start += sum(ends) / len(ends) * len(jobs) / size if problem.running.continuous else max(ends)
    assert plan.latency_s == pytest.approx(latency_s)


def test_anneal_falls_back_to_deadline_order_without_budget() -> None:
    prefill, decode = LATENCY.lines(50, 50, 50)
    jobs = [Job(prefill, decode, ttft_left=left) for left in (9.0, 1.0, 5.0, 3.0)]
    plan = anneal(Problem(jobs, Limits(1)), 1)
    assert (plan.finished, [i for batch in plan.batches for i in batch]) == (False, deadline_order(jobs))
    assert deadline_order(jobs) == [1, 3, 2, 0]


def test_anneal_spends_at_most_120_percent_of_its_budget() -> None:
    prefill, decode = LATENCY.lines(100, 100, 100)
    jobs = [Job(prefill, decode, ttft_left=0.5 * i, waited=0.1 * i) for i in range(40)]
    for budget in (4000, 20_000):
        problem = Problem(jobs, Limits(4))
        anneal(problem, budget)
        assert budget <= problem.work <= 1.2 * budget


@given(st.integers(1, 8), st.integers(1, 1000), st.integers(1, 100))
def test_latency_lines_equal_the_sum_over_tokens(batch: int, prompt: int, output: int) -> None:
    prefill, decode = LATENCY.lines(prompt, output, prompt)
    assert prefill[0] * batch + prefill[1] == pytest.approx(1e-4 * batch * prompt + 5e-3)
    steps = sum(LATENCY.step_s(batch, prompt + k) for k in range(1, output + 1))
    assert decode[0] * batch + decode[1] == pytest.approx(steps)


# --- decisions --------------------------------------------------------------------------------------------------------


def test_annealing_admits_urgent_chat_before_long_code() -> None:
    state = engine(max_num_seqs=1)
    code = make_request("code", at=NOW - 0.2, e2e=60.0, output=500)
    chat = make_request("chat", ttft=1.0, tpot=0.05, output=20)
    assert admitted(decide(Annealing(), NOW, [code, chat], [], state)) == ["chat"]


TIGHT_BATCH = [running(str(i), tpot=0.055) for i in range(20)]
"""A step takes 10 ms, 0.1 ms per sequence, and prefill of later requests: 54 ms with 20 sequences, 56 ms with 21."""


def test_annealing_admits_none_that_breaks_a_running_tpot_bound() -> None:
    waiting = [make_request("waits", ttft=30.0, output=10)]
    assert admitted(decide(Annealing(), NOW, waiting, TIGHT_BATCH, engine())) == []
    assert admitted(decide(Annealing(), NOW, waiting, [running("loose", tpot=1.0)], engine())) == ["waits"]


def test_annealing_rejects_late_requests_unless_reject_is_off() -> None:
    late = [make_request("late", ttft=0.05, prompt=1000)]
    assert rejected(decide(Annealing(), NOW, late, [], engine())) == ["late"]
    assert admitted(decide(Annealing(reject=False), NOW, late, [], engine())) == ["late"]


def test_annealing_admits_overdue_request_first() -> None:
    old = make_request("old", at=NOW - 100, output=900)
    short = [make_request(f"s{i}", output=5) for i in range(3)]
    assert admitted(decide(Annealing(), NOW, [*short, old], [], engine(max_num_seqs=1)))[0] == "old"


@dataclass(slots=True)
class CountingAnnealing(Annealing):
    """Counts its searches."""

    searches: int = 0

    def search(self, problem: Problem) -> Plan:
        self.searches += 1
        return Annealing.search(self, problem)


def test_annealing_searches_again_only_after_a_change() -> None:
    policy, state = CountingAnnealing(), engine()
    waiting = [make_request("waits", ttft=30.0, output=10)]
    for later in (0.0, 0.01):
        assert admitted(decide(policy, NOW + later, waiting, TIGHT_BATCH, state)) == []
    assert policy.searches == 1
    assert admitted(decide(policy, NOW + 0.02, waiting, [], state)) == ["waits"]
