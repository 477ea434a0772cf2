"""Simulated annealing over plans (arXiv 2504.14966).

The search maximises ln G. It begins with the best start plan and draws random moves. A move that changes ln G by delta
is accepted if delta >= 0, else with probability exp(delta / temperature).

From the paper: the objective, starts in arrival and in deadline order, the early return, and geometric cooling. Its
three moves take a job to the previous batch or to the next batch, or swap two jobs.

Additions and changes:

- a start with the shortest job first;
- moves into a new batch: the paper's moves need several steps to put a small batch between two full ones;
- temperatures in units of ln G, so that they need no scale of their own;
- an early return only if one batch holds all jobs and all attain their bounds;
- a budget in units of work instead of a clock, so that the same input gives the same plan.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gateway.policies.annealing.plan import (
    START_ORDERS,
    Plan,
    Problem,
    arrival_order,
    deadline_order,
    shortest_order,
)

T_START, T_STOP, COOLING = 0.4, 0.016, 0.95
"""First and last temperature, and the factor between two levels. For n jobs a temperature T acts as T/n on ln G. At
``T_START``, a move that loses 0.4 attained jobs is accepted with probability 1/e. The ratio and the factor are those of
the paper (500 to 20 by 0.95; from memory)."""

MAX_EXACT_JOBS = 8
"""Largest number of jobs for exhaustive search (`gateway.policies.annealing.exact`), which takes up to 3^n steps."""

WORK_PER_MOVE, WORK_PER_BATCH_VISIT = 8, 1
"""Relative CPU costs, in units of work: to draw a move, and to visit one batch of a plan."""

_TO_PREVIOUS, _TO_NEXT, _SWAP, _NEW_BEFORE, _NEW_AFTER = range(5)
"""Kinds of moves."""

_ATTAINED_OFFSET = 1e-9
"""Added to the attained jobs, so that ln G still prefers the faster of two plans that attain nothing."""

Move = tuple[int, int, list[int]]
"""The two batches that a move changes, as positions in the new plan, and the masks of the new plan."""


def anneal(problem: Problem, budget: int, seed: int = 0) -> Plan:
    """Return the best plan that ``budget`` units of work find. Equal arguments give equal plans.

    If the budget is too small to compare the starts, the plan is in deadline order and not ``finished``.
    """
    jobs = problem.jobs
    if not jobs:
        return Plan([], 0, 0.0)
    by_deadline = problem.fill(deadline_order(jobs))
    if len(START_ORDERS) * problem.work >= budget:
        return problem.plan(by_deadline, finished=False)
    by_length = problem.fill(shortest_order(jobs))
    if len(by_length) == 1 and problem.evaluate(by_length)[0] == len(jobs) > MAX_EXACT_JOBS:
        return problem.plan(by_length)
    starts = (by_deadline, by_length, problem.fill(arrival_order(jobs)))
    best = max(starts, key=lambda masks: _log_objective(*problem.evaluate(masks)))
    return problem.plan(_anneal_from(problem, best, budget, seed))


def _anneal_from(problem: Problem, start: list[int], budget: int, seed: int) -> list[int]:
    """Return the best plan found from ``start``. The cooling is spread over the remaining work."""
    uniform = random.Random(seed).random
    current = _Current(problem, start)
    best, best_score = start, current.score
    work_before, work_left = problem.work, max(1, budget - problem.work)
    levels, t_start = math.log(T_STOP / T_START) / math.log(COOLING), T_START / len(problem.jobs)
    while problem.work < budget:
        problem.work += WORK_PER_MOVE
        neighbour = _neighbour(problem, current.masks, uniform)
        if neighbour is None:
            continue
        first, masks = neighbour
        score = current.score_of(first, masks)
        gain = score - current.score
        if gain < 0:
            temperature = t_start * COOLING ** int((problem.work - work_before) / work_left * levels)
            if uniform() >= math.exp(gain / temperature):
                continue
        current.accept(first, masks)
        if score > best_score:
            best, best_score = masks, score
    return best


@dataclass(slots=True)
class _Current:
    """The current plan and its score. Entry p of ``prefix`` is (start of batch p in s, attained, latency in s) over the
    batches before p, so that a neighbour costs only the batches from its first change on."""

    problem: Problem
    masks: list[int]
    prefix: list[tuple[float, int, float]] = field(default_factory=list)
    score: float = 0.0

    def __post_init__(self) -> None:
        self.prefix = [(0.0, 0, 0.0)]
        self.accept(0, self.masks)

    def score_of(self, first: int, masks: list[int]) -> float:
        """Return ln G of ``masks``, which equal the current plan before batch ``first``. All are in the cache."""
        batches = self.problem.batches
        start, attained, latency_s = self.prefix[first]
        for mask in masks[first:]:
            duration_s, own_latency_s, latest_starts, jobs, _, _ = batches[mask]
            if latest_starts:
                attained += len(latest_starts) - bisect_left(latest_starts, start)
            latency_s += own_latency_s + jobs * start
            start += duration_s
        self.problem.work += WORK_PER_BATCH_VISIT * (len(masks) - first)
        return _log_objective(attained - self.problem.broken_by(batches[masks[0]].slots), latency_s)

    def accept(self, first: int, masks: list[int]) -> None:
        """Make ``masks`` the current plan; they equal it before batch ``first``."""
        problem = self.problem
        self.masks = masks
        del self.prefix[first + 1 :]
        start, attained, latency_s = self.prefix[first]
        for mask in masks[first:]:
            duration_s, own_latency_s, latest_starts, jobs, _, _ = problem.batch(mask)
            attained += len(latest_starts) - bisect_left(latest_starts, start)
            latency_s += own_latency_s + jobs * start
            start += duration_s
            self.prefix.append((start, attained, latency_s))
        problem.work += WORK_PER_BATCH_VISIT * (len(masks) - first)
        self.score = _log_objective(attained - problem.broken_by(problem.batch(masks[0]).slots), latency_s)


def _neighbour(problem: Problem, masks: list[int], uniform: Callable[[], float]) -> tuple[int, list[int]] | None:
    """Draw a move. Return the first batch that it changes and the new plan, or None if the move is not possible."""
    jobs = len(problem.jobs)
    job, kind = 1 << int(uniform() * jobs), int(uniform() * 5)
    if kind == _SWAP:
        move = _swap(masks, job, 1 << int(uniform() * jobs))
    elif kind in (_TO_PREVIOUS, _TO_NEXT):
        move = _shift(masks, job, kind)
    else:
        move = _split_off(masks, job, kind)
    if move is None:
        return None
    first, second, new = move
    if not problem.batch(new[first]).fits or not problem.batch(new[second]).fits:
        return None
    if first == 0 and not problem.can_join(problem.batch(new[0])):
        return None
    if not new[second]:
        del new[second]
    # An empty first batch means that no job joins the running set yet.
    if not new[first] and (first > 0 or not problem.running.slots):
        del new[first]
    return first, new


def _swap(masks: list[int], job: int, other: int) -> Move | None:
    """Exchange two jobs of different batches."""
    p = _position(masks, job)
    if masks[p] & other:
        return None
    q = _position(masks, other)
    new = masks.copy()
    new[p] ^= job | other
    new[q] ^= job | other
    return (p, q, new) if p < q else (q, p, new)


def _shift(masks: list[int], job: int, kind: int) -> Move | None:
    """Move a job to the previous or the next batch."""
    p = _position(masks, job)
    first = p - 1 if kind == _TO_PREVIOUS else p
    second = first + 1
    if first < 0 or (second == len(masks) and masks[p] == job):
        return None
    new = masks.copy()
    if second == len(new):
        new.append(0)
    new[first] ^= job
    new[second] ^= job
    return first, second, new


def _split_off(masks: list[int], job: int, kind: int) -> Move | None:
    """Move a job to a new batch of its own, just before or after its batch."""
    p = _position(masks, job)
    if masks[p] == job:
        return None
    new = masks.copy()
    new[p] ^= job
    new.insert(p if kind == _NEW_BEFORE else p + 1, job)
    return p, p + 1, new


def _position(masks: Sequence[int], job: int) -> int:
    """Return the position of the batch that holds ``job``."""
    p = 0
    while not masks[p] & job:
        p += 1
    return p


def _log_objective(attained: int, latency_s: float) -> float:
    """Return ln G. A plan that breaks more bounds of running requests than it attains scores below all others."""
    return math.log(max(attained, 0) + _ATTAINED_OFFSET) - math.log(max(latency_s, 1e-12)) + min(attained, 0)
