"""The `annealing` policy: admits the first batch of the plan with the most attained requests per second of latency.

Each decision plans the waiting requests anew, after arXiv 2504.14966. From the paper: the objective G, the bilinear
latency predictor, predicted output lengths, the search, and (with ``reject=False``) that no request is rejected. The
paper plans a fixed set of requests for an idle engine that takes whole batches.

Additions for a live queue and an engine with continuous batching:

- A plan starts from the running set. The size of a batch includes it, slots are freed one by one, and each running
  request whose TPOT bound the plan breaks counts as one lost. A plan may also admit no request for now.
- Each sequence adds the prefill time of later requests to every step, alpha * mean(prompt) / mean(output).
- A request is rejected if it would miss its deadline even if it ran now and alone.
- Only the ``horizon`` requests with the earliest deadlines are planned. A request that has waited longer than
  ``max_wait_s`` goes first.
- A policy reads no clock, so a search ends after ``budget_ms`` * ``units_per_ms`` units of work.
- Nothing is planned again until the queue or the running set has changed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from engine_adapter.engine import EngineState
from gateway.policies.annealing.exact import best_plan
from gateway.policies.annealing.latency import Latency
from gateway.policies.annealing.plan import Job, Limits, Plan, Problem, RunningSet
from gateway.policies.annealing.search import MAX_EXACT_JOBS, anneal
from gateway.policies.base import UNGATED, Decision, PrefillLookahead, reject_ttft
from gateway.requests.length_survival import surviving_quantile
from gateway.requests.request import Request

_WORK_BEFORE_EXACT = 500
"""Units of work for annealing where an exhaustive search follows: enough for a first plan that prunes well."""


@dataclass(slots=True)
class Annealing:
    """Plans the waiting requests by simulated annealing.

    Args:
        budget_ms: longest search (ms).
        units_per_ms: units of work per millisecond on this machine; `benchmarks.annealing.search_study` measures it.
        seed: seed of the search.
        length_quantile: quantile of the predicted output length to plan with.
        max_batch: most sequences in the engine; 0 is the engine's own limit.
        horizon: most requests in one plan.
        max_wait_s: a request that has waited longer than this goes first (s).
        prefill_lookahead_steps: limit on the unprefilled prompt tokens inside the engine, in steps of
            ``max_num_batched_tokens``, beyond those that it plans before a reaction (`EngineState.reaction_steps`).
        reject: whether to reject requests that cannot meet their deadline.
    """

    budget_ms: float = 3.0
    units_per_ms: float = 2000.0
    seed: int = 0
    length_quantile: float = 0.5
    max_batch: int = 0
    horizon: int = 32
    max_wait_s: float = 60.0
    prefill_lookahead_steps: float = 2.0
    reject: bool = True
    name: str = "annealing"
    gate: str = UNGATED
    _without_effect: tuple[object, ...] | None = field(default=None, init=False, repr=False, compare=False)
    """The state in which the latest decision admitted no request, or None if it admitted one."""

    def order(self, request: Request) -> tuple[float, ...]:
        """Sort by deadline, at most ``max_wait_s`` after arrival. Also the plan when the budget allows no search."""
        return (min(request.deadline_s, request.arrival_s + self.max_wait_s), request.arrival_s)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Reject late requests, then admit overdue requests and the first batch of the plan."""
        decision = Decision()
        if not waiting:
            return decision
        latency = self._latency(waiting, running, engine)
        queue = self._reject_late(now, waiting, latency, decision) if self.reject else waiting
        queue = queue[: max(1, int(self.horizon))]
        state = (
            len(waiting),
            tuple([r.id for r in queue]),
            len(running),
            sum([r.prefilling for r in running]),
        )
        if not queue or state == self._without_effect:
            return decision
        lookahead = PrefillLookahead.of(running, engine, self.prefill_lookahead_steps)
        max_slots, slots = self._max_slots(engine), sum([r.sequences for r in running])
        overdue = [r for r in queue if now - r.arrival_s > self.max_wait_s]
        planned = self.first_batch(now, queue, running, engine, latency)
        for request in [*overdue, *(r for r in planned if r not in overdue)]:
            if lookahead.fits(request) and (slots == 0 or slots + request.sequences <= max_slots):
                decision.admit.append(request)
                lookahead.add(request)
                slots += request.sequences
        self._without_effect = None if decision.admit else state
        return decision

    def first_batch(
        self,
        now: float,
        queue: Sequence[Request],
        running: Collection[Request],
        engine: EngineState,
        latency: Latency | None = None,
    ) -> list[Request]:
        """Return the first batch of the plan for ``queue``; empty if no request should join the running set now."""
        latency = latency or self._latency(queue, running, engine)
        queue = queue[: max(1, int(self.horizon))]
        lookahead = PrefillLookahead.of(running, engine, self.prefill_lookahead_steps)
        reserved = sum(
            [(r.prompt_tokens + max(r.predicted_tokens, r.length - r.prompt_tokens)) * r.sequences for r in running],
            start=-engine.shared_tokens,
        )
        limits = Limits(
            slots=self._max_slots(engine),
            kv=max(0.0, engine.kv_tokens - reserved) if engine.kv_tokens else math.inf,
            prompt=lookahead.limit - lookahead.tokens,
        )
        jobs = [self._job(now, request, latency) for request in queue]
        problem = Problem(jobs, limits, _running_set(running, latency, limits.slots, int(self.horizon)))
        return [queue[i] for i in self.search(problem).batches[0]]

    def search(self, problem: Problem) -> Plan:
        """Return the best plan within the budget. Few jobs are searched exhaustively, as far as the budget allows."""
        budget = int(self.budget_ms * self.units_per_ms)
        few = len(problem.jobs) <= MAX_EXACT_JOBS
        plan = anneal(problem, min(budget, _WORK_BEFORE_EXACT) if few else budget, int(self.seed))
        if few and plan.finished:
            plan = best_plan(problem, plan.objective, budget=budget) or plan
        return plan

    def _max_slots(self, engine: EngineState) -> int:
        return int(self.max_batch or engine.max_num_seqs)

    def _job(self, now: float, request: Request, latency: Latency) -> Job:
        tokens = request.predicted_tokens
        if self.length_quantile != 0.5:
            tokens = surviving_quantile(self.length_quantile, 0.0, tokens, request.predicted_p90)
        tokens = max(1.0, min(tokens, request.max_tokens))
        prefill, decode = latency.lines(request.prompt_tokens, tokens, request.uncached_tokens)
        waited = now - request.arrival_s
        slo, bounded = request.slo, not request.bounds_waived
        return Job(
            prefill=prefill,
            decode=decode,
            waited=waited,
            ttft_left=slo.ttft_s - waited if slo.ttft_s is not None and bounded else math.inf,
            e2e_left=slo.e2e_s - waited if slo.e2e_s is not None and bounded else math.inf,
            decode_s=slo.tpot_s * tokens if slo.tpot_s is not None and bounded else math.inf,
            kv=(request.prompt_tokens + max(tokens, request.predicted_p90)) * request.sequences - request.shared_tokens,
            prompt=request.uncached_tokens,
            slots=request.sequences,
        )

    def _latency(self, waiting: Sequence[Request], running: Collection[Request], engine: EngineState) -> Latency:
        """Return the learned forms; beside a running set with the prefill time per decoded token."""
        requests = [*running, *waiting[: int(self.horizon)]]
        prompts, outputs = sum([r.uncached_tokens for r in requests]), sum([r.predicted_tokens for r in requests])
        times = engine.step_time.times
        return Latency.of_times(times, times.alpha * prompts / max(outputs, 1.0) if running else 0.0)

    def _reject_late(
        self, now: float, waiting: Sequence[Request], latency: Latency, decision: Decision
    ) -> Sequence[Request]:
        """Reject each request whose prefill, started now and alone, would end after its deadline."""
        kept: list[Request] = []
        least_margin = math.inf
        p_bl, p_b, p_l, p_0 = latency.prefill
        for request in waiting:
            prefill_s = (p_bl + p_l) * request.uncached_tokens + p_b + p_0
            late_by = now + prefill_s - request.deadline_s
            if late_by > 0:
                predicted_s = request.ttft_slo_s + late_by
                infeasible = prefill_s > request.ttft_slo_s
                decision.reject.append(reject_ttft(request, predicted_s, predicted_s, late_by, infeasible))
                continue
            least_margin = min(least_margin, -late_by)
            kept.append(request)
        if least_margin < math.inf:
            decision.recheck_at = now + least_margin
        return kept


def _running_set(running: Collection[Request], latency: Latency, max_slots: int, horizon: int) -> RunningSet:
    """Return how many TPOT bounds of ``running`` break per number of joining sequences, and when the next one ends."""
    if not running:
        return RunningSet(continuous=True)
    slots = sum([r.sequences for r in running])
    left = [max(1.0, r.predicted_tokens - r.generated / r.sequences) for r in running]
    length = sum([(r.length + tokens / 2) * r.sequences for r, tokens in zip(running, left, strict=True)]) / slots
    bounds = sorted([r.pace_s for r in running if r.pace_s is not None and not r.bounds_waived])
    too_slow = [
        bisect_left(bounds, latency.step_s(slots + joining, length))
        for joining in range(min(horizon, max(0, max_slots - slots)) + 1)
    ]
    # Bounds that break already do not count against the joining requests.
    broken = [count - too_slow[0] for count in too_slow]
    turnover_s = sum(left) / len(left) * latency.step_s(slots, length) / slots
    return RunningSet(slots, broken, turnover_s, continuous=True)
