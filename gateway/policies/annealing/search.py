"""Simulated annealing over plans: which request goes in which batch, and the batches in which order.

After "SLO-Aware Scheduling for Large Language Model Inferences" (arXiv 2504.14966). A plan is a sequence of batches; a
batch of b requests starts when the one before it ends. With the paper's bilinear forms

    t_p(b, l) = A*b*l + B*b + C*l + D           prefill (s) of a prompt of l tokens in a batch of b,
    tau_d(b, l) = a*b*l + b'*b + c*l + d        one decode step at a context of l tokens,

and o output tokens, the decodes of a request sum to

    o*(b'*b + d) + (a*b + c)*(o*l + o*(o + 1)/2),

so both parts of its latency are straight lines in b, and a request is a handful of numbers (`Job`). The objective is

    G = n / t,      n: requests that attain their bounds, t: the sum of all latencies (s).

*The paper's:* the objective, the forms, two starts (arrival order, and sorted by what is left until the deadline), the
early return, three moves (into the batch before, into the batch after, swap two), geometric cooling. *Ours:* a third
start (shortest job); a fourth kind of move (into a batch of its own, for the three cannot put a small batch between two
full ones in one step); temperatures in units of ln G, so that no scale has to be guessed; batches as bit masks whose
sums are remembered, so that a move costs the two batches that it changes and a bisection for each one behind them; a
budget in units of work instead of a clock; and an early return only where nothing can be gained by searching on.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Line = tuple[float, float]
"""Seconds in a batch of b: first * b + second."""

T_START, T_STOP, COOLING = 0.4, 0.016, 0.95
"""In units of ln G times the number of jobs, so that at the start 0.4 of a job may be lost once in e times. The ratio
of start to stop and the cooling are those that the paper reports (500, 20, 0.95; from memory)."""

EXACT = 8
"""Up to so many requests every plan can be looked at (`annealing_exact`)."""

KINDS = 5
"""Moves: into the batch before, into the one after, swap; and, ours, into a batch of its own before or after."""

MOVE, WALK, SUM, SUM_EACH = 8, 1, 6, 2
"""Units of work: a move drawn, a batch walked over, a batch summed up and each request in it."""

_NOBODY = 1e-9
"""Counted with the attained, so that among plans that attain nothing the faster one is better."""


@dataclass(slots=True, frozen=True)
class Job:
    """A request to place. ``prefill``: seconds to its first token, by how many are prefilled together; ``decode``: from
    there to its last, by how many decode together.

    ``waited``: seconds since it came in. ``ttft_left``, ``e2e_left``: seconds until those bounds break, ``decode_s``:
    its TPOT bound times its output; all infinite where nothing is bounded. ``kv``, ``prompt``: tokens; ``places``:
    sequences.
    """

    prefill: Line
    decode: Line
    waited: float = 0.0
    ttft_left: float = math.inf
    e2e_left: float = math.inf
    decode_s: float = math.inf
    kv: float = 0.0
    prompt: float = 0.0
    slots: int = 1


@dataclass(slots=True, frozen=True)
class Limits:
    """What a batch may hold: ``places`` sequences, ``kv`` tokens at their longest, ``prompt`` tokens to prefill.

    One request always fits.
    """

    slots: int
    kv: float = math.inf
    prompt: float = math.inf


@dataclass(slots=True, frozen=True)
class Beside:
    """What runs already, under continuous batching; 0 ``places`` is the paper's setting, an idle engine.

    ``lost[k]``: how many of the running break their bounds when k sequences join now (the last holds for more).
    ``turnover_s``: seconds until one of them is done. ``continuous``: places are freed one by one, so that a batch of k
    can follow when k requests are done; else when all of the batch before are.
    """

    slots: int = 0
    lost: Sequence[int] = (0,)
    turnover_s: float = 0.0
    continuous: bool = False


class Batch(NamedTuple):
    """Sums over a batch: ``seconds`` until the next may start; ``latency`` (s) of its requests were it the first;
    ``latest``: the starts (s from now, ascending) up to which each of them still attains its bounds, of those that can
    at all; ``requests`` in ``places`` sequences; whether it ``fits`` the limits."""

    seconds: float
    latency: float
    latest: list[float]
    requests: int
    fits: bool
    slots: int


@dataclass(slots=True)
class Plan:
    """Batches in order, as lists of job numbers, with what comes of them; ``work`` units were spent on it."""

    batches: list[list[int]]
    attained: int
    latency_s: float
    work: int = 0
    finished: bool = True

    @property
    def goal(self) -> float:
        """G = n / t (1/s)."""
        return self.attained / self.latency_s if self.latency_s > 0 else math.inf


@dataclass(slots=True)
class Board:
    """The jobs of one decision, and what batches of them come to. Job i is bit i of a mask."""

    jobs: Sequence[Job]
    limits: Limits
    beside: Beside = field(default_factory=Beside)
    work: int = 0
    known: dict[int, Batch] = field(default_factory=dict, repr=False)

    def batch(self, mask: int) -> Batch:
        """The sums over a batch, computed once."""
        known = self.known.get(mask)
        if known is None:
            known = self.known[mask] = self._sums(mask)
        return known

    def _sums(self, mask: int) -> Batch:
        members = [self.jobs[i] for i in members_of(mask)]
        self.work += SUM + SUM_EACH * len(members)
        if not members:
            return Batch(self.beside.turnover_s, 0.0, [], 0, True, 0)
        limits, beside = self.limits, self.beside
        slots = sum([job.slots for job in members])
        size = min(beside.slots + slots, max(limits.slots, slots))
        waited = total = longest = 0.0
        latest = []
        for job in members:
            first = job.prefill[0] * slots + job.prefill[1]
            decode = job.decode[0] * size + job.decode[1]
            last = first + decode
            waited += job.waited
            total += last
            longest = max(longest, last)
            if decode <= job.decode_s:
                left, left_after = job.ttft_left - first, job.e2e_left - last
                latest.append(left if left < left_after else left_after)
        latest.sort()
        count = len(members)
        fits = count == 1 or (
            slots <= limits.slots
            and sum([job.kv for job in members]) <= limits.kv
            and sum([job.prompt for job in members]) <= limits.prompt
        )
        seconds = total / count * slots / size if beside.continuous else longest
        return Batch(seconds, waited + total, latest, count, fits, slots)

    def lost(self, slots: int) -> int:
        """Running requests that break their bounds when ``places`` join them."""
        lost = self.beside.lost
        return lost[slots] if slots < len(lost) else lost[-1]

    def may_lead(self, batch: Batch) -> bool:
        """Whether there is room for it beside what runs."""
        return self.beside.slots == 0 or self.beside.slots + batch.slots <= self.limits.slots

    def tally(self, masks: Sequence[int]) -> tuple[int, float]:
        """Attained and summed latency (s) of a plan."""
        start, attained, latency = 0.0, -self.lost(self.batch(masks[0]).slots) if masks else 0, 0.0
        for mask in masks:
            batch = self.batch(mask)
            attained += len(batch.latest) - bisect_left(batch.latest, start)
            latency += batch.latency + batch.requests * start
            start += batch.seconds
        self.work += len(masks)
        return attained, latency

    def filled(self, order: Iterable[int]) -> list[int]:
        """Batches filled to their limits in the given order."""
        masks: list[int] = []
        for i in order:
            grown = (masks[-1] if masks else 0) | 1 << i
            batch = self.batch(grown)
            room = batch.fits and (len(masks) > 1 or self.may_lead(batch))
            if masks and room:
                masks[-1] = grown
            else:
                if not masks and not room:
                    masks.append(0)  # nothing can join what runs: all wait
                masks.append(1 << i)
        return masks

    def plan(self, masks: Sequence[int], finished: bool = True) -> Plan:
        """The plan in words."""
        attained, latency = self.tally(masks)
        return Plan([members_of(mask) for mask in masks], attained, latency, self.work, finished)


def members_of(mask: int) -> list[int]:
    """The numbers of a mask's jobs, ascending."""
    members = []
    while mask:
        low = mask & -mask
        members.append(low.bit_length() - 1)
        mask ^= low
    return members


def arrival_order(jobs: Sequence[Job]) -> list[int]:
    """First come, first served."""
    return sorted(range(len(jobs)), key=lambda i: -jobs[i].waited)


def deadline_order(jobs: Sequence[Job]) -> list[int]:
    """By the latest moment at which a request alone could start and still be on time."""

    def latest(i: int) -> float:
        job = jobs[i]
        return min(job.ttft_left - sum(job.prefill), job.e2e_left - sum(job.prefill) - sum(job.decode))

    return sorted(range(len(jobs)), key=latest)


def shortest_order(jobs: Sequence[Job]) -> list[int]:
    """Shortest job first."""
    return sorted(range(len(jobs)), key=lambda i: sum(jobs[i].prefill) + sum(jobs[i].decode))


STRAWMEN: dict[str, Callable[[Sequence[Job]], list[int]]] = {
    "arrival": arrival_order,
    "deadline": deadline_order,
    "shortest": shortest_order,
}
"""Orders to fill batches in: where the search starts from, and what it has to beat."""


def anneal(board: Board, budget: int, seed: int = 0) -> Plan:
    """The best plan that ``budget`` units of work find.

    Deterministic in its arguments. A budget that does not even suffice to weigh the starts leaves deadline order
    (``finished`` False).
    """
    jobs = board.jobs
    if not jobs:
        return Plan([], 0, 0.0)
    fallback = board.filled(deadline_order(jobs))
    if len(STRAWMEN) * board.work >= budget:
        return board.plan(fallback, finished=False)
    shortest = board.filled(shortest_order(jobs))
    if len(shortest) == 1 and board.tally(shortest)[0] == len(jobs) > EXACT:
        return board.plan(shortest)  # one batch holds all, and everybody is on time
    starts = (fallback, shortest, board.filled(arrival_order(jobs)))
    best = max(starts, key=lambda masks: _score(*board.tally(masks)))
    return board.plan(_cool_down(board, best, budget, seed))


@dataclass(slots=True)
class _Walk:
    """Where the search stands: a plan, and where each of its batches starts with what came of those before it."""

    board: Board
    masks: list[int]
    prefix: list[tuple[float, int, float]] = field(default_factory=list)
    score: float = 0.0

    def __post_init__(self) -> None:
        self.prefix = [(0.0, 0, 0.0)]
        self.score = self.take(0, self.masks)

    def weigh(self, first: int, masks: list[int]) -> float:
        """The score of ``masks``, which are those at hand up to ``first``: nothing before that is looked at."""
        known = self.board.known
        start, attained, latency = self.prefix[first]
        for mask in masks[first:]:
            seconds, own, latest, count, _, _ = known[mask]
            if latest:
                attained += len(latest) - bisect_left(latest, start)
            latency += own + count * start
            start += seconds
        self.board.work += WALK * (len(masks) - first)
        return _score(attained - self.board.lost(known[masks[0]].slots), latency)

    def take(self, first: int, masks: list[int]) -> float:
        """Go there; answers its score."""
        board = self.board
        self.masks = masks
        del self.prefix[first + 1 :]
        start, attained, latency = self.prefix[first]
        for mask in masks[first:]:
            seconds, own, latest, count, _, _ = board.batch(mask)
            attained += len(latest) - bisect_left(latest, start)
            latency += own + count * start
            start += seconds
            self.prefix.append((start, attained, latency))
        board.work += WALK * (len(masks) - first)
        self.score = _score(attained - board.lost(board.batch(masks[0]).slots), latency)
        return self.score


def _holding(masks: Sequence[int], bit: int) -> int:
    """Which batch has this job."""
    p = 0
    while not masks[p] & bit:
        p += 1
    return p


def _neighbour(board: Board, masks: list[int], uniform: Callable[[], float]) -> tuple[int, list[int]] | None:
    """The first batch that differs, and the new plan; None when the move that was drawn is not possible."""
    n = len(board.jobs)
    bit, kind = 1 << int(uniform() * n), int(uniform() * KINDS)
    p = _holding(masks, bit)
    new = masks.copy()
    if kind == 2:
        # Swap with one of another batch.
        other = 1 << int(uniform() * n)
        if masks[p] & other:
            return None
        q = _holding(masks, other)
        new[p] ^= bit | other
        new[q] ^= bit | other
        first, second = (p, q) if p < q else (q, p)
    elif kind < 2:
        # Into the batch before (0) or after (1).
        first = p - 1 + kind
        second = first + 1
        if first < 0 or (second == len(new) and new[p] == bit):
            return None
        if second == len(new):
            new.append(0)
        new[first] ^= bit
        new[second] ^= bit
    else:
        # Into a batch of its own, just before (3) or after (4).
        if new[p] == bit:
            return None
        first, second = p, p + 1
        new[p] ^= bit
        new.insert(p + kind - 3, bit)
    if not board.batch(new[first]).fits or not board.batch(new[second]).fits:
        return None
    if first == 0 and not board.may_lead(board.batch(new[0])):
        return None
    if not new[second]:
        del new[second]
    if not new[first] and (first > 0 or not board.beside.slots):
        del new[first]
    return first, new


def _cool_down(board: Board, start: list[int], budget: int, seed: int) -> list[int]:
    """Anneal from ``start``; the cooling is spread over the work that is left. The best plan on the way."""
    uniform = random.Random(seed).random
    walk = _Walk(board, start)
    best, best_score = start, walk.score
    began, span = board.work, max(1, budget - board.work)
    levels, hot = math.log(T_STOP / T_START) / math.log(COOLING), T_START / len(board.jobs)
    while board.work < budget:
        board.work += MOVE
        step = _neighbour(board, walk.masks, uniform)
        if step is None:
            continue
        score = walk.weigh(*step)
        gain = score - walk.score
        if gain < 0:
            temperature = hot * COOLING ** int((board.work - began) / span * levels)
            if uniform() >= math.exp(gain / temperature):
                continue
        walk.take(*step)
        if score > best_score:
            best, best_score = step[1], score
    return best


def _score(attained: int, latency: float) -> float:
    """ln G. Losing more of what runs than is gained is worst of all."""
    return math.log(max(attained, 0) + _NOBODY) - math.log(max(latency, 1e-12)) + min(attained, 0)
