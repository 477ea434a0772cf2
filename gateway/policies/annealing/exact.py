"""Exhaustive search for the best plan of a few jobs: dynamic programming over sets of jobs, with branch and bound.

The search extends partial plans by one batch at a time, in ascending order of the set of planned jobs. It drops a
partial plan only if that cannot lead to a better plan:

- Dominance: another partial plan of the same set ends no later, attains no fewer and has no more latency.
- Bound: even if each remaining job ran at once and alone, G would not exceed that of the best plan so far.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

from gateway.policies.annealing.plan import WORK_PER_BATCH_SUM, WORK_PER_JOB_SUMMED, Plan, Problem, job_numbers

PartialPlan = tuple[float, int, float, tuple[int, ...]]
"""End (s from now), attained jobs, summed latency (s), masks of the batches. A plain tuple, since this loop is hot."""


def best_plan(problem: Problem, known: float = 0.0, *, prune: bool = True, budget: float = math.inf) -> Plan | None:
    """Return the plan with the largest G if that exceeds ``known`` (1/s), else None. Takes up to 3^n steps for n jobs.

    With ``prune=False`` the bound ignores the durations and deadlines of the remaining jobs. After ``budget`` units of
    work, the best plan so far counts.
    """
    all_jobs = (1 << len(problem.jobs)) - 1
    if not all_jobs:
        return None
    problem.work += all_jobs + 1
    bound = _Bound(problem, known, prune)
    fronts: list[list[PartialPlan]] = [[] for _ in range(all_jobs + 1)]
    fronts[0] = _starts(problem)
    slots = max(1, problem.limits.slots)
    for planned in range(all_jobs):
        if problem.work >= budget:
            break
        rest = all_jobs ^ planned
        for partial in fronts[planned]:
            problem.work += 1 << rest.bit_count()
            chosen = rest
            while chosen and problem.work < budget:
                grown = _extend(problem, partial, chosen) if chosen.bit_count() <= slots else None
                if grown is not None and bound.can_improve(grown, rest ^ chosen):
                    if chosen == rest:
                        bound.best, fronts[all_jobs] = grown[1] / grown[2], [grown]
                    else:
                        _add_if_undominated(fronts[planned | chosen], grown)
                chosen = (chosen - 1) & rest  # the next smaller subset of the rest
    found = fronts[all_jobs]
    return problem.plan(found[0][3]) if found else None


@dataclass(slots=True)
class _Bound:
    """An upper bound on G over all completions of a partial plan. ``best`` is the largest G so far (1/s)."""

    problem: Problem
    best: float
    prune: bool
    cache: dict[int, tuple[float, list[float]]] = field(default_factory=dict)

    def can_improve(self, partial: PartialPlan, left: int) -> bool:
        """Return whether ``partial``, completed with the jobs of ``left``, could have a larger G than ``best``."""
        end, attained, latency_s, _ = partial
        count = left.bit_count()
        possible, least_latency_s = attained + count, 0.0
        if self.prune and possible > self.best * (latency_s + count * end):
            least_latency_s, latest_starts = self.cache.get(left) or self._of_jobs(left)
            possible = attained + len(latest_starts) - bisect_left(latest_starts, end)
        return possible > self.best * (latency_s + least_latency_s + count * end)

    def _of_jobs(self, mask: int) -> tuple[float, list[float]]:
        """Return the least summed latency (s) of the jobs of ``mask``, and their latest starts (s, ascending).

        No job takes less time than alone. Of n jobs in batches of at most p, at least n - j*p have j batches before
        them, each of which holds one of the other jobs.
        """
        problem = self.problem
        alone = [problem.batch(1 << i) for i in job_numbers(mask)]
        problem.work += WORK_PER_BATCH_SUM + WORK_PER_JOB_SUMMED * len(alone)
        least_latency_s = sum([batch.latency_s for batch in alone])
        if not problem.running.continuous:
            slots, durations = problem.limits.slots, sorted([batch.duration_s for batch in alone])
            for j, shortest in enumerate(durations, start=1):
                if (behind := len(durations) - j * slots) <= 0:
                    break
                least_latency_s += behind * shortest
        latest_starts = sorted([start for batch in alone for start in batch.latest_starts])
        self.cache[mask] = least_latency_s, latest_starts
        return least_latency_s, latest_starts


def _starts(problem: Problem) -> list[PartialPlan]:
    """Return the empty plan, and beside a running set the plan in which no job joins it at first."""
    starts: list[PartialPlan] = [(0.0, 0, 0.0, ())]
    if problem.running.slots:
        starts.append((problem.running.turnover_s, -problem.broken_by(0), 0.0, (0,)))
    return starts


def _extend(problem: Problem, partial: PartialPlan, chosen: int) -> PartialPlan | None:
    """Return ``partial`` with one more batch, or None if that does not fit."""
    start, attained, latency_s, masks = partial
    batch = problem.batch(chosen)
    if not batch.fits:
        return None
    if not masks:
        if not problem.can_join(batch):
            return None
        attained -= problem.broken_by(batch.slots)
    attained += len(batch.latest_starts) - bisect_left(batch.latest_starts, start)
    return start + batch.duration_s, attained, latency_s + batch.latency_s + batch.jobs * start, (*masks, chosen)


def _add_if_undominated(front: list[PartialPlan], new: PartialPlan) -> None:
    """Add ``new`` to ``front`` unless a partial plan there dominates it; remove the plans that it dominates."""
    end, attained, latency_s, _ = new
    for other in front:
        if other[0] <= end and other[1] >= attained and other[2] <= latency_s:
            return
    front[:] = [o for o in front if not (end <= o[0] and attained >= o[1] and latency_s <= o[2])]
    front.append(new)
