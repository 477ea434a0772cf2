"""Upper bounds on SLO adherence that no scheduler can pass, from true lengths and what engine steps cost.

**Work.** Let a step with p prefill tokens, d decodes and C tokens of decode context take t(p, d, C). If

    t(p, d, C) >= x*p + y*d + z*C      for every step that the engine can make,                            (1)

then summing (1) over all steps of a run, and counting only the tokens of requests that attained their SLO, gives

    sum of w_i over attained i <= time in steps,    w_i = x*p_i + y*(o_i - 1) + z*(sum of i's decode contexts). (2)

The first of o_i output tokens comes out of the prefill's last step, so o_i - 1 tokens are decoded; the j-th of them
reads at least p_i + j - 1 tokens. Each (x, y, z) with (1) is a `Work`. `works` finds several, as the support of the
profile's steps: the fixed cost of a step enters, spread over as many tokens as the scheduler's limits let into one
step, and how it is split between prefill and decode is what the several differ in. Each gives a valid bound; the least
counts.

**Deadlines.** A request that attains its SLO is finished by D_i = arrival + TTFT bound + (o_i - 1) * TPOT bound
(or by its end-to-end bound), and
nothing is computed for it before it arrives. So in any window that begins at s, for every t,

    sum of w_i over attained i that arrive from s on and have D_i <= t    <=    t - s.                    (3)

*Count bound.* The largest set that satisfies (3) for one s and all t is a classic: one machine, jobs of length w_i,
due at D_i - s, fewest late. Moore-Hodgson finds it exactly: in order of due dates, whenever the work exceeds the time,
drop the largest job so far. The run's attained set satisfies (3), so it is no larger. Wherever a window is cut in two,
it is also bounded by its two parts plus every request that straddles the cut; the lesser of the two counts, and so on
within the parts: this is what sees a burst inside a long quiet trace. With t the last deadline alone, (3) is the plain
bound "all work fits into all time"; the other t and s only tighten it.

*Fair bound.* The same windows filled in proportion: who attains does not depend on size, so of the N requests due by t,
whose work is W, at most N * (t - s) / W attain (in expectation), and at best all others. A policy that plays no
favourites cannot pass it by more than chance; one that prefers cheap requests can, up to the count bound.

A request is left out of both when it could not attain its SLO on an idle engine: the shortest decode step exceeds its
TPOT bound, or its prefill its TTFT bound.

The bounds hold for engines that make one token per sequence and step, whose prompts share no cached prefix, and whose
scheduler keeps the limits that `works` was given. A sequence that is preempted gets one token out of its recomputation
that is counted as a decode here; computing a context anew is dearer than the one decode, so nothing is gained by it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine_adapter.step_time.profile import Profile, Regime
from lab.workload import WorkloadRequest

Floats = NDArray[np.float64]

_SPLITS = 9
"""How many divisions of a step's fixed cost between prefill and decode `works` tries."""

_SMALLEST_WINDOW = 256
"""Windows of fewer than twice as many requests are not cut: too many would straddle for anything to be gained."""

_ROUNDING = 1e-9
"""Relative allowance for sums of floating point numbers: a schedule that just fits must not count as impossible."""


@dataclass(frozen=True, slots=True)
class Work:
    """The least engine time (s) that tokens cost: coefficients x, y, z of (1), and the shortest step there is."""

    per_prompt_token_s: float
    per_decode_s: float
    per_context_token_s: float = 0.0
    shortest_step_s: float = 0.0


def works(
    profile: Profile, *, max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None
) -> list[Work]:
    """Costs that satisfy (1) for every step that ``profile`` times.

    The limits are those that the run kept, if other than the profile's own: sequences and tokens in one step.
    """
    seqs = max_num_seqs or profile.max_num_seqs
    tokens = max(max_num_batched_tokens or profile.max_num_batched_tokens, seqs)
    per_context = max(0.0, min(regime.per_decode_context for regime in profile.regimes))
    prefill, decodes, seconds = _extreme_steps(profile, seqs, tokens)
    shortest = float(seconds.min())
    prefill_only, decoding = decodes == 0, decodes > 0
    dearest = float((seconds[prefill_only] / prefill[prefill_only]).min())
    found = []
    for per_prompt in np.linspace(0.0, dearest, _SPLITS):
        # With x given, the largest y that (1) allows.
        per_decode = float(((seconds - per_prompt * prefill)[decoding] / decodes[decoding]).min())
        if per_decode >= 0:
            found.append(Work(float(per_prompt), per_decode, per_context, shortest))
    return found


def _extreme_steps(profile: Profile, seqs: int, tokens: int) -> tuple[Floats, Floats, Floats]:
    """Prefill tokens, decodes and least seconds (decode context's share aside) of the steps that decide (1).

    With the number of decodes fixed, a regime is linear in the prefill tokens, and so is (1): its ends are enough.
    """
    columns: list[tuple[Floats, Floats, Floats]] = []
    decodes = np.arange(seqs + 1)
    # Without chunked prefill, a prompt longer than the limit goes by itself.
    longest = max(tokens, profile.max_model_len)
    lower = 0
    for regime in profile.regimes:
        upper = int(min(regime.up_to_tokens, longest))
        for edge in (lower + 1, min(upper, tokens), upper):
            prefill = np.maximum(edge - decodes, 0)
            total = decodes + prefill
            possible = (total > lower) & (total <= np.where(decodes == 0, upper, min(upper, tokens)))
            p, d = prefill[possible].astype(np.float64), decodes[possible].astype(np.float64)
            columns.append((p, d, _least_seconds(profile, regime, p, d)))
        lower = upper
        if lower >= longest:
            break
    prefill_tokens, decoding, seconds = (np.concatenate(column) for column in zip(*columns, strict=True))
    return prefill_tokens, decoding, seconds


def _least_seconds(profile: Profile, regime: Regime, prefill: Floats, decodes: Floats) -> Floats:
    """What a step costs at least, whatever its contexts, beyond the least cost of its decode context."""
    seconds = regime.base + (regime.per_token + regime.per_prefill_token) * prefill
    seconds = seconds + (regime.per_token + regime.per_decode) * decodes
    # A fit may have context make a step cheaper. There is never more context than the cache holds.
    seconds += min(0.0, regime.per_decode_context) * profile.kv_tokens
    seconds += min(0.0, regime.per_prefill_context) * profile.kv_tokens
    seconds += min(0.0, regime.per_prefill_pair) * prefill * profile.kv_tokens
    seconds += np.where(decodes > 0, regime.per_decode_step, 0.0) + np.where(prefill > 0, regime.per_prefill_step, 0.0)
    return np.maximum(seconds, 0.0)


def bounds(workload: Sequence[WorkloadRequest], costs: Work | Sequence[Work], engines: int = 1) -> tuple[float, float]:
    """Count bound and fair bound on the adherence of ``workload``, fractions of all its requests.

    ``engines`` equal engines are at best one that is so many times as fast.

    Raises:
        ValueError: no requests, or no costs.
    """
    every = [costs] if isinstance(costs, Work) else list(costs)
    if not workload or not every:
        raise ValueError("bounds need at least one request and one Work")
    jobs = [_jobs(workload, work, engines) for work in every]
    fair = [_least(job, _in_proportion) for job in jobs]
    # The heap is slower than the proportion, and the costs that are tight for one are tight for the other.
    tightest = sorted(range(len(every)), key=fair.__getitem__)[:2]
    count = min(_least(jobs[which], _most) for which in tightest)
    return count / len(workload), min(*fair, count) / len(workload)


@dataclass(frozen=True, slots=True)
class _Jobs:
    """Attainable requests in order of deadline: arrival (s), deadline (s), work (s), each of shape (n,)."""

    arrival: Floats
    deadline: Floats
    work: Floats

    def __len__(self) -> int:
        return len(self.work)

    def only(self, which: NDArray[np.bool_]) -> _Jobs:
        return _Jobs(self.arrival[which], self.deadline[which], self.work[which])


def _jobs(workload: Sequence[WorkloadRequest], cost: Work, engines: int) -> _Jobs:
    columns = [(a.at_s, a.prompt_tokens, a.output_tokens, a.ttft_slo_s, a.tpot_slo_s, a.e2e_slo_s) for a in workload]
    arrival, prompt, output, ttft, tpot, e2e = np.array(columns, dtype=np.float64).T
    decoded = np.maximum(output - 1, 0)
    context = decoded * prompt + decoded * (decoded - 1) / 2
    prefill = cost.per_prompt_token_s * prompt
    work = prefill + cost.per_decode_s * decoded + cost.per_context_token_s * context
    slack = 1 + _ROUNDING
    in_time = np.maximum(prefill, cost.shortest_step_s) <= ttft * slack
    apace = (decoded == 0) | (cost.shortest_step_s + cost.per_context_token_s * prompt <= tpot * slack)
    ends = prefill + decoded * cost.shortest_step_s <= e2e * slack
    # A single token has no pace to keep, whatever that is.
    tail = decoded * np.where(decoded > 0, tpot, 0.0)
    jobs = _Jobs(arrival, (arrival + np.minimum(ttft + tail, e2e)) * slack, work / engines)
    order = np.argsort(jobs.deadline, kind="stable")
    return jobs.only(order[(in_time & apace & ends)[order]])


def _least(jobs: _Jobs, fill: Callable[[_Jobs], float]) -> float:
    """The least that ``fill`` and the parts of the window say can attain."""
    if not len(jobs):
        return 0.0
    whole = fill(jobs)
    if len(jobs) < 2 * _SMALLEST_WINDOW:
        return whole
    cut = _quietest(jobs)
    before, after = jobs.deadline <= cut, jobs.arrival >= cut
    straddling = len(jobs) - int(before.sum()) - int(after.sum())
    if straddling >= whole or not before.any() or not after.any():
        return whole
    return min(whole, _least(jobs.only(before), fill) + _least(jobs.only(after), fill) + straddling)


def _quietest(jobs: _Jobs) -> float:
    """Where to cut the window: of its quarters, in time and in requests, the one that the fewest requests straddle."""
    first, last = float(jobs.arrival.min()), float(jobs.arrival.max())
    quarters = (0.5, 0.25, 0.75)
    cuts = [first + share * (last - first) for share in quarters]
    cuts += np.quantile(jobs.arrival, quarters).tolist()
    return min(cuts, key=lambda cut: int(((jobs.arrival < cut) & (jobs.deadline > cut)).sum()))


def _room(jobs: _Jobs) -> Floats:
    """Time from the window's first arrival to each deadline."""
    return jobs.deadline - float(jobs.arrival.min())


def _most(jobs: _Jobs) -> float:
    """Moore-Hodgson: the most jobs that can be done by their deadlines, arrivals aside."""
    room = _room(jobs)
    if (np.cumsum(jobs.work) <= room).all():
        return len(jobs)
    kept: list[float] = []
    total = 0.0
    for work, left in zip(jobs.work.tolist(), room.tolist(), strict=True):
        heapq.heappush(kept, -work)
        total += work
        if total > left:
            total += heapq.heappop(kept)
    return len(kept)


def _in_proportion(jobs: _Jobs) -> float:
    """The fewest, over all deadlines, of: those due by it in proportion to the time there is, and all others."""
    due = np.arange(1, len(jobs) + 1)
    total = np.cumsum(jobs.work)
    share = np.minimum(1.0, _room(jobs) / np.maximum(total, np.finfo(float).tiny))
    return float((len(jobs) - due * (1 - share)).min())
