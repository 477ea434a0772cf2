"""The best plan there is, for up to eight requests: what annealing is checked against, and how it ends when few wait.

Exhaustive over every sequence of batches, by dynamic programming over the sets of requests that are served already. A
beginning is dropped only when it cannot lead to anything better: because another over the same set is no later, attains
no fewer and has no more latency; or because even if each of the rest ran at once and alone, G would be below that of a
plan that is known (branch and bound).
"""

from __future__ import annotations

import math
from bisect import bisect_left

from gateway.policies.annealing.search import SUM, SUM_EACH, Board, Plan, members_of

_Beginning = tuple[float, int, float, tuple[int, ...]]
"""Where it ends (s), attained, summed latency (s), its batches."""


def best_plan(board: Board, known: float = 0.0, *, prune: bool = True, budget: float = math.inf) -> Plan | None:
    """The plan of the largest G, if that is above ``known`` (1/s); else None. Takes up to 3^n steps for n jobs.

    ``prune``: by the bound on G too. ``budget``: units of work after which the best so far has to do.
    """
    jobs = board.jobs
    everybody = (1 << len(jobs)) - 1
    if not everybody:
        return None
    board.work += 1 << len(jobs)
    floors: dict[int, tuple[float, list[float]]] = {}
    counts = [mask.bit_count() for mask in range(everybody + 1)]
    fronts: list[list[_Beginning]] = [[] for _ in range(everybody + 1)]
    fronts[0] = [(0.0, 0, 0.0, ())]
    if board.beside.slots:
        fronts[0].append((board.beside.turnover_s, -board.lost(0), 0.0, (0,)))  # nobody joins what runs, at first
    slots = board.limits.slots
    for served in range(everybody):
        if board.work >= budget:
            break
        rest = everybody ^ served
        for start, attained, latency, batches in fronts[served]:
            chosen = rest
            board.work += 1 << counts[rest]
            while chosen and board.work < budget:
                if counts[chosen] <= slots or counts[chosen] == 1:
                    batch = board.batch(chosen)
                    if batch.fits and (batches or board.may_lead(batch)):
                        late = bisect_left(batch.latest, start)
                        now_attained = attained + len(batch.latest) - late - (0 if batches else board.lost(batch.slots))
                        now_latency = latency + batch.latency + batch.requests * start
                        end, left = start + batch.seconds, rest ^ chosen
                        possible, least = now_attained + counts[left], 0.0
                        if prune and possible > known * (now_latency + counts[left] * end):
                            least, latest = floors.get(left) or floors.setdefault(left, _at_best(board, left))
                            possible = now_attained + len(latest) - bisect_left(latest, end)
                        if possible > known * (now_latency + least + counts[left] * end):
                            new = (end, now_attained, now_latency, (*batches, chosen))
                            if left:
                                _add(fronts[served | chosen], new)
                            else:
                                known, fronts[everybody] = now_attained / now_latency, [new]
                chosen = (chosen - 1) & rest
    found = fronts[everybody]
    return board.plan(found[0][3]) if found else None


def _at_best(board: Board, mask: int) -> tuple[float, list[float]]:
    """What no plan of these jobs can beat: the summed latency (s) were they next, and their latest starts, ascending.

    Each takes no less than alone; of n in batches of p, at least n - j*p have j batches before them, each with one of
    the others in it.
    """
    alone = [board.batch(1 << i) for i in members_of(mask)]
    board.work += SUM + SUM_EACH * len(alone)
    least = sum([batch.latency for batch in alone])
    if not board.beside.continuous:
        slots, seconds = board.limits.slots, sorted([batch.seconds for batch in alone])
        for j, shortest in enumerate(seconds, start=1):
            if (behind := len(seconds) - j * slots) <= 0:
                break
            least += behind * shortest
    return least, sorted([one for batch in alone for one in batch.latest])


def _add(front: list[_Beginning], new: _Beginning) -> None:
    """Keep what nothing else is at least as good as."""
    end, attained, latency, _ = new
    for other in front:
        if other[0] <= end and other[1] >= attained and other[2] <= latency:
            return
    front[:] = [o for o in front if not (end <= o[0] and attained >= o[1] and latency <= o[2])]
    front.append(new)
