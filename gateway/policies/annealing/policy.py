"""Annealing: order and batches that maximise attained requests per second of latency (arXiv 2504.14966).

At every decision the queue is planned anew (`annealing_search`): which requests go now, and in what groups the others
follow. What the plan has first is admitted.

*The paper's:* the objective G, the bilinear latency predictor, output lengths as predicted, the search, and that
nothing is refused for the sake of others. It plans a standing set of requests for an idle engine that takes whole
batches.

*Ours*, so that it serves a queue that never stands still in front of an engine that batches continuously:

- The plan starts beside what runs. A batch's size counts the running too, places are freed one by one, and a plan pays
  for every running request whose bounds it breaks. "Nobody, for now" is a plan as well.
- Each sequence pays for the prefill of those that will follow it, alpha * mean(prompt) / mean(output) a step.
- What cannot attain its SLO even if it went now and alone is refused (``reject``), as the gateway promises.
- Only the ``horizon`` most urgent are planned, in deadline order; who waits beyond ``max_wait_s`` goes first.
- A search is bounded by ``budget_ms``. A policy reads no clock: the budget is spent in units of work, of which a
  millisecond has ``units_per_ms``, measured once on the machine at hand (``python -m
  benchmarks.annealing.search_study``).
- Nothing is planned again until the queue or the batch has changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from engine_adapter.engine import EngineState
from gateway.policies.annealing.exact import best_plan
from gateway.policies.annealing.latency import Latency
from gateway.policies.annealing.search import EXACT, Beside, Board, Job, Limits, Plan, anneal
from gateway.policies.base import UNGATED, Decision, PrefillLookahead, reject_ttft
from gateway.requests.length_survival import surviving_quantile
from gateway.requests.request import Request


@dataclass(slots=True)
class Annealing:
    """``budget_ms``: the most a search takes, at ``units_per_ms``. ``seed``: of its random numbers.

    ``length_quantile``: of the predicted distribution of output lengths, to plan with. ``max_batch``: sequences in the
    engine, at most (0: the engine's own limit). ``prefill_lookahead_steps``: steps' worth of prompt tokens in one
    batch.
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
    _settled: tuple[object, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def order(self, request: Request) -> tuple[float, ...]:
        """By the deadline of the first token; also what is left when the budget is too small to search."""
        return (min(request.deadline_s, request.arrival_s + self.max_wait_s), request.arrival_s)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Refuse what is too late, admit what the plan has first."""
        decision = Decision()
        if not waiting:
            return decision
        latency = self._latency(waiting, running, engine)
        queue = self._refuse_late(now, waiting, latency, decision) if self.reject else waiting
        queue = queue[: max(1, int(self.horizon))]
        seen = (
            len(waiting),
            tuple([r.id for r in queue]),
            len(running),
            sum([r.prefilling for r in running]),
        )
        if not queue or seen == self._settled:
            return decision
        lookahead = PrefillLookahead.of(running, self.prefill_lookahead_steps * engine.max_num_batched_tokens)
        most, slots = int(self.max_batch or engine.max_num_seqs), sum([r.sequences for r in running])
        overdue = [r for r in queue if now - r.arrival_s > self.max_wait_s]
        planned = self.planned(now, queue, running, engine, latency)
        for request in [*overdue, *(r for r in planned if r not in overdue)]:
            if lookahead.fits(request) and (slots == 0 or slots + request.sequences <= most):
                decision.admit.append(request)
                lookahead.add(request)
                slots += request.sequences
        self._settled = None if decision.admit else seen
        return decision

    def planned(
        self,
        now: float,
        queue: Sequence[Request],
        running: Collection[Request],
        engine: EngineState,
        latency: Latency | None = None,
    ) -> list[Request]:
        """Who goes now: the first batch of the plan, in the order of ``queue``."""
        latency = latency or self._latency(queue, running, engine)
        queue = queue[: max(1, int(self.horizon))]
        lookahead = PrefillLookahead.of(running, self.prefill_lookahead_steps * engine.max_num_batched_tokens)
        held = sum(
            [(r.prompt_tokens + max(r.predicted_tokens, r.length - r.prompt_tokens)) * r.sequences for r in running]
        )
        limits = Limits(
            slots=int(self.max_batch or engine.max_num_seqs),
            kv=max(0.0, engine.kv_tokens - held) if engine.kv_tokens else math.inf,
            prompt=lookahead.limit - lookahead.tokens,
        )
        jobs = [self._job(now, request, latency) for request in queue]
        board = Board(jobs, limits, _beside(running, latency, limits.slots, self.horizon))
        return [queue[i] for i in self.search(board).batches[0]]

    def search(self, board: Board) -> Plan:
        """The plan within the budget: annealed, and with few requests proven or improved to the best there is."""
        budget = int(self.budget_ms * self.units_per_ms)
        few = len(board.jobs) <= EXACT
        plan = anneal(board, min(budget, _WARM_UP) if few else budget, int(self.seed))
        if few and plan.finished:
            plan = best_plan(board, plan.goal, budget=budget) or plan
        return plan

    def _job(self, now: float, request: Request, latency: Latency) -> Job:
        tokens = request.predicted_tokens
        if self.length_quantile != 0.5:
            tokens = surviving_quantile(self.length_quantile, 0.0, tokens, request.predicted_p90)
        tokens = max(1.0, min(tokens, request.max_tokens))
        prefill, decode = latency.lines(request.prompt_tokens, tokens)
        waited = now - request.arrival_s
        slo, insists = request.slo, not request.best_effort
        return Job(
            prefill=prefill,
            decode=decode,
            waited=waited,
            ttft_left=slo.ttft_s - waited if slo.ttft_s is not None and insists else math.inf,
            e2e_left=slo.e2e_s - waited if slo.e2e_s is not None and insists else math.inf,
            decode_s=slo.tpot_s * tokens if slo.tpot_s is not None and insists else math.inf,
            kv=(request.prompt_tokens + max(tokens, request.predicted_p90)) * request.sequences,
            prompt=request.prompt_tokens,
            slots=request.sequences,
        )

    def _latency(self, waiting: Sequence[Request], running: Collection[Request], engine: EngineState) -> Latency:
        known = [*running, *waiting[: int(self.horizon)]]
        prompts, outputs = sum([r.prompt_tokens for r in known]), sum([r.predicted_tokens for r in known])
        times = engine.step_time.times
        return Latency.of_times(times, times.alpha * prompts / max(outputs, 1.0) if running else 0.0)

    def _refuse_late(
        self, now: float, waiting: Sequence[Request], latency: Latency, decision: Decision
    ) -> Sequence[Request]:
        """Not even at once and alone would they have their first token in time."""
        kept: list[Request] = []
        least = math.inf
        p_bl, p_b, p_l, p_0 = latency.prefill
        for request in waiting:
            own_s = (p_bl + p_l) * request.prompt_tokens + p_b + p_0
            late_by = now + own_s - request.deadline_s
            if late_by > 0:
                predicted_s = request.ttft_slo_s + late_by
                infeasible = own_s > request.ttft_slo_s
                decision.reject.append(reject_ttft(request, predicted_s, predicted_s, late_by, infeasible))
                continue
            least = min(least, -late_by)
            kept.append(request)
        if least < math.inf:
            decision.recheck_at = now + least
        return kept


_WARM_UP = 500
"""Units of work that annealing gets where the best plan is found by exhaustion: enough for a bound that prunes well."""


def _beside(running: Collection[Request], latency: Latency, most: int, horizon: int) -> Beside:
    """What runs: how many of it break their pace for so many newcomers, and when the next of it is done."""
    if not running:
        return Beside(continuous=True)
    slots = sum([r.sequences for r in running])
    length = sum(
        [(r.length + max(1.0, r.predicted_tokens - r.generated / r.sequences) / 2) * r.sequences for r in running]
    )
    length /= slots
    paces = sorted([r.pace_s for r in running if r.pace_s is not None and not r.best_effort])
    lost, broken = [], 0
    now_broken = None
    for joined in range(min(int(horizon), max(0, most - slots)) + 1):
        step = latency.step_s(slots + joined, length)
        while broken < len(paces) and paces[broken] < step:
            broken += 1
        if now_broken is None:
            now_broken = broken  # those who are lost already are not lost by who joins
        lost.append(broken - now_broken)
    left = sum([max(1.0, r.predicted_tokens - r.generated / r.sequences) for r in running]) / len(running)
    return Beside(slots, lost, left * latency.step_s(slots, length) / slots, continuous=True)
