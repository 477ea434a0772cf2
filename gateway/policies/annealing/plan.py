"""Plans, and the objective that ranks them (arXiv 2504.14966).

A plan is a sequence of batches of jobs. Each batch starts when the one before it ends. The objective to maximise is

    G = n / t        n: jobs that attain their bounds,  t: sum of all latencies (s).

The latency of a job is linear in the size of its batch (`gateway.policies.annealing.latency`), so a job is a few
numbers (`Job`). A batch is a bit mask, in which bit i stands for job i. The sums over a batch are computed once and
cached by mask, so that a search step costs only the batches that it changes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.policies.annealing.latency import Linear

WORK_PER_BATCH_SUM, WORK_PER_JOB_SUMMED = 6, 2
"""Relative CPU costs, in units of work: to sum up a batch, and to add each job to that sum."""


@dataclass(slots=True, frozen=True)
class Job:
    """One request to plan.

    Attributes:
        prefill: seconds until its first token, linear in the number of sequences that are prefilled with it.
        decode: seconds from its first to its last token, linear in the number of sequences that decode with it.
        waited: seconds since its arrival.
        ttft_left: seconds until its TTFT bound breaks; infinite without one.
        e2e_left: seconds until its end-to-end bound breaks; infinite without one.
        decode_s: the longest decode time within its TPOT bound (s); infinite without one.
        kv: KV memory at its full length (tokens).
        prompt: tokens to prefill.
        slots: its sequences.
    """

    prefill: Linear
    decode: Linear
    waited: float = 0.0
    ttft_left: float = math.inf
    e2e_left: float = math.inf
    decode_s: float = math.inf
    kv: float = 0.0
    prompt: float = 0.0
    slots: int = 1


@dataclass(slots=True, frozen=True)
class Limits:
    """The most that a batch may hold: sequences, KV memory (tokens) and tokens to prefill. One job always fits."""

    slots: int
    kv: float = math.inf
    prompt: float = math.inf


@dataclass(slots=True, frozen=True)
class RunningSet:
    """The requests that already run. The default is the paper's setting: an idle engine that takes whole batches.

    Attributes:
        slots: running sequences.
        broken: entry k is the number of running requests whose TPOT bound breaks if k sequences join now. The last
            entry holds for larger k too.
        turnover_s: seconds until the next running sequence ends.
        continuous: whether slots are freed one by one. A batch of k sequences then starts when k earlier ones have
            ended; otherwise it starts when the whole batch before it has ended.
    """

    slots: int = 0
    broken: Sequence[int] = (0,)
    turnover_s: float = 0.0
    continuous: bool = False


class Batch(NamedTuple):
    """Sums over the jobs of one batch.

    Attributes:
        duration_s: seconds from its start until the next batch may start.
        latency_s: summed latency of its jobs (s) if it starts now.
        latest_starts: for each job that can attain its bounds, its latest start (s from now), ascending.
        jobs: number of jobs.
        fits: whether it is within the limits.
        slots: number of sequences.
    """

    duration_s: float
    latency_s: float
    latest_starts: list[float]
    jobs: int
    fits: bool
    slots: int


@dataclass(slots=True)
class Plan:
    """Batches of job numbers, in order.

    Attributes:
        attained: jobs that attain their bounds, less the running requests whose bounds the plan breaks.
        latency_s: summed latency of all jobs (s).
        work: units of work that the search has spent.
        finished: False if the budget ended before the search began.
    """

    batches: list[list[int]]
    attained: int
    latency_s: float
    work: int = 0
    finished: bool = True

    @property
    def objective(self) -> float:
        """G = n / t (1/s)."""
        return self.attained / self.latency_s if self.latency_s > 0 else math.inf


@dataclass(slots=True)
class Problem:
    """The jobs to plan, the limits of a batch, and the running set.

    ``work`` counts the units of work spent so far. ``batches`` caches `Batch` by mask.
    """

    jobs: Sequence[Job]
    limits: Limits
    running: RunningSet = field(default_factory=RunningSet)
    work: int = 0
    batches: dict[int, Batch] = field(default_factory=dict, repr=False)

    def batch(self, mask: int) -> Batch:
        """Return the sums over the jobs of ``mask``. The empty batch lets the running set go on alone."""
        batch = self.batches.get(mask)
        if batch is None:
            batch = self.batches[mask] = self._sum_up(mask)
        return batch

    def _sum_up(self, mask: int) -> Batch:
        jobs = [self.jobs[i] for i in job_numbers(mask)]
        count = len(jobs)
        self.work += WORK_PER_BATCH_SUM + WORK_PER_JOB_SUMMED * count
        if not jobs:
            return Batch(self.running.turnover_s, 0.0, [], 0, True, 0)
        slots = sum([job.slots for job in jobs])
        size = min(self.running.slots + slots, max(self.limits.slots, slots))
        waited = total = longest = 0.0
        latest_starts = []
        for job in jobs:
            first = job.prefill[0] * slots + job.prefill[1]
            decode = job.decode[0] * size + job.decode[1]
            last = first + decode
            waited += job.waited
            total += last
            longest = max(longest, last)
            if decode <= job.decode_s:
                for_ttft, for_e2e = job.ttft_left - first, job.e2e_left - last
                latest_starts.append(for_ttft if for_ttft < for_e2e else for_e2e)
        latest_starts.sort()
        fits = count == 1 or (
            slots <= self.limits.slots
            and sum([job.kv for job in jobs]) <= self.limits.kv
            and sum([job.prompt for job in jobs]) <= self.limits.prompt
        )
        duration_s = total / count * slots / size if self.running.continuous else longest
        return Batch(duration_s, waited + total, latest_starts, count, fits, slots)

    def broken_by(self, slots: int) -> int:
        """Return how many running requests break their TPOT bound if ``slots`` sequences join now."""
        broken = self.running.broken
        return broken[slots] if slots < len(broken) else broken[-1]

    def can_join(self, batch: Batch) -> bool:
        """Return whether ``batch`` may run beside the running set, and so may be the first of a plan."""
        return self.running.slots == 0 or self.running.slots + batch.slots <= self.limits.slots

    def evaluate(self, masks: Sequence[int]) -> tuple[int, float]:
        """Return the attained jobs and the summed latency (s) of a plan."""
        start, latency_s = 0.0, 0.0
        attained = -self.broken_by(self.batch(masks[0]).slots) if masks else 0
        for mask in masks:
            batch = self.batch(mask)
            attained += len(batch.latest_starts) - bisect_left(batch.latest_starts, start)
            latency_s += batch.latency_s + batch.jobs * start
            start += batch.duration_s
        self.work += len(masks)
        return attained, latency_s

    def fill(self, order: Iterable[int]) -> list[int]:
        """Return the masks of batches that are filled up to the limits in ``order`` (job numbers)."""
        masks: list[int] = []
        for i in order:
            grown = (masks[-1] if masks else 0) | 1 << i
            batch = self.batch(grown)
            fits = batch.fits and (len(masks) > 1 or self.can_join(batch))
            if masks and fits:
                masks[-1] = grown
            else:
                if not masks and not fits:
                    masks.append(0)  # no job can join the running set yet
                masks.append(1 << i)
        return masks

    def plan(self, masks: Sequence[int], finished: bool = True) -> Plan:
        """Return ``masks`` as a plan of job numbers with its values."""
        attained, latency_s = self.evaluate(masks)
        return Plan([job_numbers(mask) for mask in masks], attained, latency_s, self.work, finished)


def job_numbers(mask: int) -> list[int]:
    """Return the jobs of ``mask``, ascending."""
    jobs = []
    while mask:
        low = mask & -mask
        jobs.append(low.bit_length() - 1)
        mask ^= low
    return jobs


def arrival_order(jobs: Sequence[Job]) -> list[int]:
    """Return job numbers by arrival."""
    return sorted(range(len(jobs)), key=lambda i: -jobs[i].waited)


def deadline_order(jobs: Sequence[Job]) -> list[int]:
    """Return job numbers by the latest start at which the job, alone, still attains its bounds."""

    def latest_start(i: int) -> float:
        job = jobs[i]
        return min(job.ttft_left - sum(job.prefill), job.e2e_left - sum(job.prefill) - sum(job.decode))

    return sorted(range(len(jobs)), key=latest_start)


def shortest_order(jobs: Sequence[Job]) -> list[int]:
    """Return job numbers by the job's own latency, alone."""
    return sorted(range(len(jobs)), key=lambda i: sum(jobs[i].prefill) + sum(jobs[i].decode))


START_ORDERS: dict[str, Callable[[Sequence[Job]], list[int]]] = {
    "arrival": arrival_order,
    "deadline": deadline_order,
    "shortest": shortest_order,
}
"""Orders that give the start plans of the search. They are its baselines too: a finished search is never worse."""
