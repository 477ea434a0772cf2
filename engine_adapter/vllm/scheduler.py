"""The step gate as a vLLM scheduler class.

    vllm serve MODEL --scheduler-cls engine_adapter.vllm_scheduler.SloScheduler

vLLM resolves the class by name inside its EngineCore process. A request's TPOT bound arrives in
``SamplingParams.extra_args`` (``vllm_xargs`` in an OpenAI body) as ``antares_tpot_ms``. Requests without it are never
gated, so an engine that sees none behaves exactly as stock vLLM. ``antares_gate`` beside it names the gate that paces
the request; who names ``slack`` and has no bound makes way for others in a full engine
(`engine_adapter.gates.best_effort_preemption`).
Environment: ``ANTARES_GATE`` names the gate of those that name none (``credit``, the default, ``slack`` or ``open``);
``ANTARES_GATE_SOCKET`` says where reports go, and unset they go nowhere.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from engine_adapter.engine import GATE_XARG, TPOT_XARG
from engine_adapter.gates.best_effort_preemption import BestEffortPreemption, Room, Seen
from engine_adapter.gates.composite import Gates
from engine_adapter.vllm.gate_channel import GateReporter
from engine_adapter.vllm.orphan import PARENT_ENV, exit_with_parent
from engine_adapter.vllm.versions import GATE_VERSIONS, PREEMPTION_VERSIONS, require, within

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

GATE_ENV = "ANTARES_GATE"
_LEAST_BOUND_MS = 1.0
"""No engine decodes a token in less; a smaller bound would only starve the others (their TRP is relative to it)."""

_MAX_LABELS = 32

_READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""Who waits for a place only. Others wait for a grammar, or for more input."""

require(vllm.__version__, GATE_VERSIONS, "The Antares step gate")


@dataclass(slots=True)
class _Gated:
    """What the gate knows of one request: its id, its TPOT bound (s), its gate, its context length (tokens).

    ``label`` is the bound's name in the counters.
    """

    request_id: str
    tpot_slo_s: float | None
    gate: str
    label: str
    length: int = 0


@dataclass(slots=True)
class _Step:
    """A scheduled step whose result is not back yet."""

    decode_requests: int
    prefill_tokens: int
    mean_context: float
    scheduled_at: float


class SloScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM ships no types we can follow
    """vLLM's AsyncScheduler with a step gate in front of every ``schedule()``.

    NOTE: subclass AsyncScheduler, not Scheduler, or vLLM switches asynchronous scheduling off.
    """

    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self._gate = Gates(os.environ.get(GATE_ENV, "credit"))
        except ValueError as error:
            raise ValueError(f"{GATE_ENV}: {error}") from error
        self._gated: dict[str, _Gated] = {}
        self._make_way = self._can_preempt_best_effort()
        self._reporter = GateReporter.from_env()
        self._reporter.report.preemptible = self._make_way is not None
        if PARENT_ENV in os.environ:
            # We run inside a gateway's engine: should the gateway be killed, nobody else would stop it.
            exit_with_parent(int(os.environ[PARENT_ENV]))
        self._without_pace: set[str] = set()
        """Requests here that make way for others; some of them have ended."""
        self._in_flight: deque[_Step] = deque()
        self._last_step_end = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Let the gate mark who sits this step out, then schedule as vLLM does."""
        started = time.perf_counter()
        kept_out = self._keep_out(time.monotonic())
        decoding, context, bounded = self._decoding()
        sat_out: set[str] = set()
        budget: int = self.max_num_scheduled_tokens
        if bounded:
            plan = self._gate.plan(time.monotonic(), decoding, min(self._prefill_backlog(), budget))
            sat_out = plan.sit_out
            if plan.max_prefill_tokens is not None:
                # NOTE: the step's own budget, never long_prefill_token_threshold: that one caps each request.
                cap = len(decoding) - len(sat_out) + plan.max_prefill_tokens
                self.max_num_scheduled_tokens = max(1, min(budget, cap))
            for request_id in sat_out:
                request = self.requests[request_id]
                # schedule() advances current_step first, so +2 skips exactly the coming step.
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        gate_seconds = time.perf_counter() - started

        output = super().schedule(*args, **kwargs)
        self.max_num_scheduled_tokens = budget
        for request in kept_out:
            self.waiting.add_request(request)

        started = time.perf_counter()
        self._count(output, decoding, context, sat_out)
        self._reporter.report.gate_seconds += gate_seconds + time.perf_counter() - started
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Pass the step's result on, and report how long the step took."""
        result = super().update_from_output(scheduler_output, *args, **kwargs)
        now = time.monotonic()
        if scheduler_output.total_num_scheduled_tokens and self._in_flight:
            step = self._in_flight.popleft()
            # Steps are scheduled ahead of time: one begins when it is scheduled or when the one before it ends,
            # whichever is later.
            elapsed = now - max(step.scheduled_at, self._last_step_end)
            self._reporter.step(now, step.decode_requests, step.prefill_tokens, step.mean_context, elapsed)
            started = time.perf_counter()
            self._gate.observe(step.decode_requests, step.prefill_tokens, step.mean_context, elapsed)
            self._reporter.report.gate_seconds += time.perf_counter() - started
        self._last_step_end = now
        if not self.running:
            self._reporter.flush(now)
        return result

    def add_request(self, request: Request) -> None:
        """Queue it as vLLM does, and remember whether it makes way for others."""
        super().add_request(request)
        gated = self._gated.get(request.request_id) or self._remember(request)
        # NOTE: a session that is put aside at the end of its input would be lost; and pooling has no tokens to keep.
        keeps_on = request.resumable or request.sampling_params is None
        if self._make_way is not None and self._gate.preemptible(gated) and not keeps_on:
            self._without_pace.add(request.request_id)

    def _can_preempt_best_effort(self) -> BestEffortPreemption | None:
        """None where vLLM could not take a request out of a running batch, or the operator has his own order."""
        if self.policy != SchedulingPolicy.FCFS or self.connector is not None or self.ec_connector is not None:
            return None
        if not within(vllm.__version__, PREEMPTION_VERSIONS):
            return None
        return BestEffortPreemption(Room(self.max_num_active_reqs, self.kv_cache_manager.block_pool.num_gpu_blocks))

    def _keep_out(self, now: float) -> list[Request]:
        """Put aside who must make way now; those put aside who wait on are taken out of the queue, and answered."""
        if self._make_way is None or self._pause_state != PauseState.UNPAUSED:
            return []
        pool, mine = self.kv_cache_manager.block_pool, self._without_pace
        active = len(self.running) + self.num_waiting_for_streaming_input
        free = Room(
            self.max_num_active_reqs - active, pool.get_num_free_blocks() - self.kv_cache_manager.watermark_blocks
        )
        if mine:
            mine &= self.requests.keys()
        if not mine:
            self._make_way.note(now, Room(active + len(self.waiting), pool.num_gpu_blocks - free.blocks))
            return []
        batch = [r for r in self.running if r.request_id in mine]
        others = [r for r in self.waiting if r.request_id in mine]
        aside = [r for r in others if r.status == RequestStatus.PREEMPTED]
        new = [r for r in others if r.status != RequestStatus.PREEMPTED]
        latest = [r for r in reversed(batch) if not r.is_prefill_chunk]
        way = self._make_way.plan(now, self._seen(free, batch, latest, aside or new))
        if way is None:
            return []
        for request in latest[: way.leaving]:
            self._reporter.report.best_effort_preemptions += 1
            self.running.remove(request)
            self._preempt_request(request, now)
            aside.insert(0, request)
        for request in batch if way.rest else []:
            if request.is_prefill_chunk:
                # schedule() advances current_step first, so +2 skips exactly the coming step.
                request.next_decode_eligible_step = self.current_step + 2
        first = [(aside or new).pop(0)] if way.first else []
        going = [aside.pop(0)] if way.goes_on and not first and aside else []
        self.waiting.remove_requests([*first, *new, *going, *aside])
        for request in first:
            self.waiting.prepend_request(request)
        for request in [*new, *going]:
            self.waiting.add_request(request)
        return aside

    def _seen(self, free: Room, batch: list[Request], latest: list[Request], waiting: list[Request]) -> Seen:
        """``batch`` runs and ``waiting`` waits without a pace; ``latest`` could make way, who came last first."""
        prompts = [r for r in self.running if r.is_prefill_chunk and self._paced(r)]
        comers = [r for r in self.waiting if r.status in _READY and self._paced(r)]
        rest = sum([self._blocks(r.num_tokens) - self._blocks(r.num_computed_tokens) for r in prompts])
        computing = any(r.is_prefill_chunk and r.num_preemptions for r in batch)
        return Seen(
            free=free,
            others=Room(len(batch), sum([self._blocks(r.num_computed_tokens) for r in batch])),
            wanted=Room(len(comers), sum([self._blocks(r.num_tokens) for r in comers]) + rest),
            latest=[self._blocks(r.num_computed_tokens) for r in latest],
            next_blocks=None if computing or not waiting else self._blocks(waiting[0].num_tokens),
            prompts=bool(prompts or comers),
            others_prompts=any(r.is_prefill_chunk for r in batch),
        )

    def _paced(self, request: Request) -> bool:
        gated = self._gated.get(request.request_id) or self._remember(request)
        return gated.tpot_slo_s is not None

    def _blocks(self, tokens: int) -> int:
        """Of KV memory, in all groups of layers; where some of these keep fewer, that is more than it takes."""
        return -(-tokens // int(self.block_size)) * int(self.kv_cache_manager.num_kv_cache_groups)

    def _decoding(self) -> tuple[list[_Gated], float, bool]:
        """The running requests that would decode one token now, their summed context, and whether any has a bound."""
        decoding: list[_Gated] = []
        context = 0.0
        bounded = False
        for request in self.running:
            # What is left to compute is exactly the next output token: neither a prefill chunk nor a recompute.
            if request.num_computed_tokens < request.num_prompt_tokens or (
                request.num_tokens + request.num_output_placeholders - request.num_computed_tokens > 1
            ):
                continue
            # NOTE: under async scheduling vLLM itself skips a request whose last token is already on its way;
            # that is no opportunity to decode, and it must not cost a credit.
            if (
                request.num_output_placeholders > 0
                and request.num_computed_tokens + 2 - request.num_output_placeholders
                >= request.num_prompt_tokens + request.max_tokens
            ):
                continue
            gated = self._gated.get(request.request_id) or self._remember(request)
            gated.length = request.num_tokens + request.num_output_placeholders
            decoding.append(gated)
            context += request.num_computed_tokens
            bounded = bounded or gated.tpot_slo_s is not None
        return decoding, context, bounded

    def _prefill_backlog(self) -> int:
        """Prompt tokens that were admitted to the engine and are not computed yet, nor rest in the coming step."""
        coming = self.current_step + 1
        running = sum(
            [
                r.num_prompt_tokens - r.num_computed_tokens
                for r in self.running
                if r.num_prompt_tokens > r.num_computed_tokens and r.next_decode_eligible_step <= coming
            ]
        )
        return int(running + sum(r.num_prompt_tokens for r in self.waiting))

    def _remember(self, request: Request) -> _Gated:
        if len(self._gated) > 2 * len(self.requests) + 64:
            for request_id in self._gated.keys() - self.requests.keys():
                del self._gated[request_id]
                self._gate.forget(request_id)
        xargs = (request.sampling_params and request.sampling_params.extra_args) or {}
        given = xargs.get(TPOT_XARG)
        # A bound of 0 or infinity would give somebody a TRP of 0, which is never to decode again.
        bound = None
        if isinstance(given, int | float) and 0 < given < math.inf:
            bound = max(_LEAST_BOUND_MS, float(given))
        gated = _Gated(
            request_id=request.request_id,
            tpot_slo_s=None if bound is None else bound / 1000,
            gate=str(xargs.get(GATE_XARG, "")),
            label=self._label("none" if bound is None else f"{bound:g}"),
        )
        self._gated[request.request_id] = gated
        return gated

    def _label(self, label: str) -> str:
        """The bound's name in the counters; clients choose bounds freely, so past a limit they share one name."""
        known = self._reporter.report.eligible
        return label if label in known or len(known) < _MAX_LABELS else "other"

    def _count(self, output: SchedulerOutput, decoding: list[_Gated], context: float, sat_out: set[str]) -> None:
        scheduled = output.num_scheduled_tokens
        if not output.total_num_scheduled_tokens:
            return
        report = self._reporter.report
        report.steps += 1
        report.gated_steps += bool(sat_out)
        decoded = 0
        for gated in decoding:
            report.eligible[gated.label] = report.eligible.get(gated.label, 0) + 1
            if gated.request_id in scheduled:
                decoded += 1
                report.batched[gated.label] = report.batched.get(gated.label, 0) + 1
        self._in_flight.append(
            _Step(
                decode_requests=decoded,
                prefill_tokens=output.total_num_scheduled_tokens - decoded,
                mean_context=context / len(decoding) if decoding else 0.0,
                scheduled_at=time.monotonic(),
            )
        )
