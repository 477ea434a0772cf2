"""Upper bounds on SLO adherence that no scheduler can exceed, from true lengths and the cost of engine steps.

**Token costs.** Let a step with p prefill tokens, d decodes and C tokens of decode context take t(p, d, C). If

    t(p, d, C) >= x*p + y*d + z*C      for every step that the engine can run,                             (1)

then summing (1) over all steps of a run, and counting only the tokens of requests that attained their SLO, gives

    sum of w_i over attained i <= time in steps,    w_i = x*u_i + y*(o_i - 1) + z*(sum of i's decode contexts). (2)

Here p_i is the prompt and u_i is the part of it that i computes even with a perfect prefix cache (see below); without
shared prefixes u_i = p_i. The last prefill step produces the first of o_i output tokens, so o_i - 1 tokens are decoded.
The j-th decode reads at least p_i + j - 1 tokens. Each (x, y, z) that satisfies (1) is a `TokenCosts`. `token_costs`
returns several of them. Each spreads the fixed cost of a step over as many tokens as the scheduler's limits allow in
one step. They differ in how they split it between prefill and decode. Each gives a valid bound; the lowest bound is
used.

**Deadlines.** Request i is due at D_i = arrival + TTFT bound + (o_i - 1) * TPOT bound, or at its end-to-end bound.
An attained request finishes by D_i, and the engine computes nothing for it before it arrives. So in any window that
begins at s, for every t,

    sum of w_i over attained i that arrive from s on and have D_i <= t    <=    t - s.                    (3)

*Count bound.* Finding the largest set that satisfies (3) for one s and all t is a scheduling problem on one machine.
Job i has length w_i and is due at D_i - s, and as few jobs as possible may be late. Moore-Hodgson solves it exactly: in
order of due dates, it drops the largest job so far whenever the work exceeds the time. The attained set of a run
satisfies (3), so it cannot be larger. Cutting a window in two gives another bound: the bounds of both parts plus every
request that straddles the cut. The lower of the two is used, recursively. This detects a burst inside a long quiet
trace. With t at the last deadline only, (3) says "all work fits in all the time"; the other t and s tighten it.

*Fair bound.* The same windows, filled in proportion: attainment does not depend on request size. Let N requests with
total work W be due by t. In expectation, at most N * (t - s) / W of them attain. At best, all other requests attain.
A policy that does not prefer cheap requests exceeds it only by chance. A policy that does can reach the count bound.

Both bounds exclude a request that cannot attain its SLO on an idle engine: the shortest decode step exceeds its TPOT
bound, or its prefill exceeds its TTFT bound.

*Prefix cache.* The cache may hold a leading block of the prompt of i if another request with this block arrives before
the first token of i is due. At best it is never evicted. All other prompt tokens of an attained i, and always the last
one, are computed for i (`uncached_tokens`).

The bounds assume that a step produces one token per sequence. The scheduler must keep the limits given to
`token_costs`. A preempted sequence gets one token from its recomputation, which is counted as a decode here.
Recomputing a context costs more than one decode, so the bounds stay valid."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine_adapter.step_time.profile import Profile, Regime
from lab.workload import WorkloadRequest
from lab.workload.sessions import BLOCK_TOKENS

Floats = NDArray[np.float64]

_SPLITS = 9
"""Number of splits of a step's fixed cost between prefill and decode that `token_costs` returns at most."""

_SMALLEST_WINDOW = 256
"""A window with fewer than twice this many requests is not cut: too many requests would straddle the cut."""

_ROUNDING = 1e-9
"""Relative tolerance for floating-point sums, so that a schedule that exactly fits counts as possible."""


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """Lower bounds on the engine time (s) per token: coefficients x, y, z of (1), and the shortest possible step."""

    per_prompt_token_s: float
    per_decode_s: float
    per_context_token_s: float = 0.0
    shortest_step_s: float = 0.0


def token_costs(
    profile: Profile, *, max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None
) -> list[TokenCosts]:
    """Return costs that satisfy (1) for every step that ``profile`` times.

    ``max_num_seqs`` and ``max_num_batched_tokens`` replace the profile's own limits on one step.
    """
    seqs = max_num_seqs or profile.max_num_seqs
    tokens = max(max_num_batched_tokens or profile.max_num_batched_tokens, seqs)
    per_context = max(0.0, min(regime.per_decode_context for regime in profile.regimes))
    prefill, decodes, seconds = _extreme_steps(profile, seqs, tokens)
    shortest = float(seconds.min())
    prefill_only, decoding = decodes == 0, decodes > 0
    max_per_prompt = float((seconds[prefill_only] / prefill[prefill_only]).min())
    costs = []
    for per_prompt in np.linspace(0.0, max_per_prompt, _SPLITS):
        # The largest y that (1) allows for this x.
        per_decode = float(((seconds - per_prompt * prefill)[decoding] / decodes[decoding]).min())
        if per_decode >= 0:
            costs.append(TokenCosts(float(per_prompt), per_decode, per_context, shortest))
    return costs


def _extreme_steps(profile: Profile, seqs: int, tokens: int) -> tuple[Floats, Floats, Floats]:
    """Return prefill tokens, decodes and minimum seconds, without decode context, of the steps that determine (1).

    For a fixed number of decodes, both a regime and (1) are linear in the prefill tokens. So the ends of each regime
    are enough. Each array has shape (steps,).
    """
    columns: list[tuple[Floats, Floats, Floats]] = []
    decodes = np.arange(seqs + 1)
    # Without chunked prefill, a prompt above the token limit runs in a step of its own.
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
    """Return the minimum seconds of a step over all contexts, without the minimum cost of its decode context."""
    seconds = regime.base + (regime.per_token + regime.per_prefill_token) * prefill
    seconds = seconds + (regime.per_token + regime.per_decode) * decodes
    # A fitted coefficient of context may be negative. The KV cache limits the context that it multiplies.
    seconds += min(0.0, regime.per_decode_context) * profile.kv_tokens
    seconds += min(0.0, regime.per_prefill_context) * profile.kv_tokens
    seconds += min(0.0, regime.per_prefill_pair) * prefill * profile.kv_tokens
    seconds += np.where(decodes > 0, regime.per_decode_step, 0.0) + np.where(prefill > 0, regime.per_prefill_step, 0.0)
    return np.maximum(seconds, 0.0)


def bounds(
    workload: Sequence[WorkloadRequest], costs: TokenCosts | Sequence[TokenCosts], engines: int = 1
) -> tuple[float, float]:
    """Return the count bound and the fair bound on the adherence of ``workload``, as fractions of all its requests.

    ``engines`` equal engines are treated as one engine that is ``engines`` times as fast.

    Raises:
        ValueError: no requests, or no costs.
    """
    all_costs = [costs] if isinstance(costs, TokenCosts) else list(costs)
    if not workload or not all_costs:
        raise ValueError("bounds need at least one request and one TokenCosts")
    uncached = np.array(uncached_tokens(workload), dtype=np.float64)
    jobs = [_jobs(workload, uncached, cost, engines) for cost in all_costs]
    fair = [_lowest_bound(job, _proportional_bound) for job in jobs]
    # Moore-Hodgson is slower, and costs that give a tight fair bound give a tight count bound too.
    tightest = sorted(range(len(all_costs)), key=fair.__getitem__)[:2]
    count = min(_lowest_bound(jobs[i], _moore_hodgson) for i in tightest)
    return count / len(workload), min(*fair, count) / len(workload)


def uncached_tokens(workload: Sequence[WorkloadRequest]) -> list[int]:
    """Return, for each request, the prompt tokens that it computes even if the prefix cache never evicts a block.

    Requests with an equal block hash must have equal prefixes up to it (`WorkloadRequest.blocks`).
    """
    if not any(request.blocks for request in workload):
        return [request.prompt_tokens for request in workload]
    # The two earliest requests that have a block. One of them is another one than any given request.
    first: dict[int, int] = {}
    second: dict[int, int] = {}
    for number in sorted(range(len(workload)), key=lambda number: workload[number].at_s):
        for block in reversed(workload[number].blocks):
            if block in second:
                break  # The same two requests have all blocks before it.
            if block in first:
                second[block] = number
            else:
                first[block] = number

    def available(number: int, block: int, due_s: float) -> bool:
        other = second.get(block) if first[block] == number else first[block]
        return other is not None and workload[other].at_s <= due_s

    uncached = []
    for number, request in enumerate(workload):
        due_s = request.at_s + min(request.ttft_slo_s, request.e2e_slo_s)
        # Binary search for the leading available blocks: a request that has a block has all blocks before it.
        low, high = 0, min((request.prompt_tokens - 1) // BLOCK_TOKENS, len(request.blocks))
        while low < high:
            middle = (low + high + 1) // 2
            if available(number, request.blocks[middle - 1], due_s):
                low = middle
            else:
                high = middle - 1
        uncached.append(request.prompt_tokens - low * BLOCK_TOKENS)
    return uncached


@dataclass(frozen=True, slots=True)
class _Jobs:
    """Requests that an idle engine can serve, in order of deadline: arrival, deadline and work (s), shape (n,)."""

    arrival: Floats
    deadline: Floats
    work: Floats

    def __len__(self) -> int:
        return len(self.work)

    def select(self, mask: NDArray[np.bool_]) -> _Jobs:
        return _Jobs(self.arrival[mask], self.deadline[mask], self.work[mask])


def _jobs(workload: Sequence[WorkloadRequest], uncached: Floats, cost: TokenCosts, engines: int) -> _Jobs:
    columns = [(a.at_s, a.prompt_tokens, a.output_tokens, a.ttft_slo_s, a.tpot_slo_s, a.e2e_slo_s) for a in workload]
    arrival, prompt, output, ttft, tpot, e2e = np.array(columns, dtype=np.float64).T
    decoded = np.maximum(output - 1, 0)
    context = decoded * prompt + decoded * (decoded - 1) / 2
    prefill = cost.per_prompt_token_s * uncached
    work = prefill + cost.per_decode_s * decoded + cost.per_context_token_s * context
    tolerance = 1 + _ROUNDING
    ttft_feasible = np.maximum(prefill, cost.shortest_step_s) <= ttft * tolerance
    tpot_feasible = (decoded == 0) | (cost.shortest_step_s + cost.per_context_token_s * prompt <= tpot * tolerance)
    e2e_feasible = prefill + decoded * cost.shortest_step_s <= e2e * tolerance
    # Avoids 0 * inf: a TPOT bound does not apply to a single output token.
    decode_s = decoded * np.where(decoded > 0, tpot, 0.0)
    jobs = _Jobs(arrival, (arrival + np.minimum(ttft + decode_s, e2e)) * tolerance, work / engines)
    order = np.argsort(jobs.deadline, kind="stable")
    return jobs.select(order[(ttft_feasible & tpot_feasible & e2e_feasible)[order]])


def _lowest_bound(jobs: _Jobs, bound: Callable[[_Jobs], float]) -> float:
    """Return the lower of ``bound`` over the whole window and over its parts, recursively; in requests."""
    if not len(jobs):
        return 0.0
    whole = bound(jobs)
    if len(jobs) < 2 * _SMALLEST_WINDOW:
        return whole
    cut = _best_cut(jobs)
    before, after = jobs.deadline <= cut, jobs.arrival >= cut
    straddling = len(jobs) - int(before.sum()) - int(after.sum())
    if straddling >= whole or not before.any() or not after.any():
        return whole
    return min(whole, _lowest_bound(jobs.select(before), bound) + _lowest_bound(jobs.select(after), bound) + straddling)


def _best_cut(jobs: _Jobs) -> float:
    """Return the time (s) at which to cut the window.

    The candidates are its quarters, in time and in requests. The one with the fewest straddling requests is chosen.
    """
    first, last = float(jobs.arrival.min()), float(jobs.arrival.max())
    quarters = (0.5, 0.25, 0.75)
    cuts = [first + share * (last - first) for share in quarters]
    cuts += np.quantile(jobs.arrival, quarters).tolist()
    return min(cuts, key=lambda cut: int(((jobs.arrival < cut) & (jobs.deadline > cut)).sum()))


def _available_s(jobs: _Jobs) -> Floats:
    """Return the seconds from the window's first arrival to each deadline, shape (n,)."""
    return jobs.deadline - float(jobs.arrival.min())


def _moore_hodgson(jobs: _Jobs) -> float:
    """Return the largest number of jobs that can finish by their deadlines, ignoring arrival times."""
    available_s = _available_s(jobs)
    if (np.cumsum(jobs.work) <= available_s).all():
        return len(jobs)
    kept: list[float] = []
    total = 0.0
    for work, available in zip(jobs.work.tolist(), available_s.tolist(), strict=True):
        heapq.heappush(kept, -work)
        total += work
        if total > available:
            total += heapq.heappop(kept)
    return len(kept)


def _proportional_bound(jobs: _Jobs) -> float:
    """Return the fair bound of one window, in jobs.

    For each deadline t: the jobs due by t, times the share of their work that fits, plus all later jobs. The minimum
    over t counts.
    """
    due = np.arange(1, len(jobs) + 1)
    total = np.cumsum(jobs.work)
    # Without work, as of responses with one token, all of it fits.
    share = np.minimum(1.0, np.divide(_available_s(jobs), total, out=np.ones_like(total), where=total > 0))
    return float((len(jobs) - due * (1 - share)).min())
