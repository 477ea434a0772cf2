"""vLLM's scheduler class with a step gate.

    vllm serve MODEL --scheduler-cls engine_adapter.vllm_scheduler.SloScheduler

vLLM resolves the class by name inside its EngineCore process. A request states its pace in
``SamplingParams.extra_args`` (``vllm_xargs`` in an OpenAI body) as ``antares_tpot_ms``, the gate that plans for it as
``antares_gate``, and its service kind as ``antares_kind`` where the pace does not imply it. An engine without such
requests behaves exactly as stock vLLM.

Environment: ``ANTARES_GATE`` names the gate of requests that name none (``credit``, the default, ``slack`` or
``open``). ``ANTARES_GATE_SOCKET`` is where reports go; without it there are none.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from engine_adapter.engine import GATE_XARG, KIND_XARG, TPOT_XARG
from engine_adapter.gates.best_effort_preemption import BestEffortPreemption, Capacity, Member
from engine_adapter.gates.composite import Gates
from engine_adapter.gates.pace_labels import PaceLabels
from engine_adapter.gates.phase import is_prefilling, tokens_left
from engine_adapter.service_kind import KINDS_BY_LABEL, ServiceKind, default_kind
from engine_adapter.vllm.features import check_server
from engine_adapter.vllm.gate_channel import GateReporter
from engine_adapter.vllm.orphan import PARENT_ENV, exit_with_parent
from engine_adapter.vllm.unsplittable import least_prefill_tokens
from engine_adapter.vllm.versions import PREEMPTION_VERSIONS, require_gate, within

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

GATE_ENV = "ANTARES_GATE"
_MIN_PACE_MS = 1.0
"""Milliseconds. No engine decodes faster, and a smaller pace would starve all others (TRP is relative to it)."""

_READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""Statuses of requests that wait for a slot only; others wait for a grammar or for more input."""

require_gate(vllm.__version__)


@dataclass(slots=True)
class _Gated:
    """A request as the gate sees it (`gates.base.Decoding`). ``label`` names its pace in the counters."""

    request_id: str
    kind: ServiceKind
    pace_s: float | None
    gate: str
    label: str
    length: int = 0


@dataclass(slots=True)
class _Step:
    """A scheduled step whose result is pending."""

    decode_requests: int
    prefill_tokens: int
    mean_context: float
    scheduled_at: float


class SloScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM ships no types we can follow
    """vLLM's AsyncScheduler with a step gate in front of every ``schedule()``.

    NOTE: subclass AsyncScheduler, not Scheduler, or vLLM switches asynchronous scheduling off.
    """

    max_num_scheduled_tokens: int
    running: list[Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if PARENT_ENV not in os.environ:
            check_server(self.vllm_config)
        try:
            self._gate = Gates(os.environ.get(GATE_ENV, "credit"))
        except ValueError as error:
            raise ValueError(f"{GATE_ENV}: {error}") from error
        self._gated: dict[str, _Gated] = {}
        self._labels = PaceLabels()
        self._preemption = self._best_effort_preemption()
        self._reporter = GateReporter.from_env()
        self._reporter.report.preemptible = self._preemption is not None
        if PARENT_ENV in os.environ:
            # This process belongs to a gateway; if the gateway is killed, nothing else would stop it.
            exit_with_parent(int(os.environ[PARENT_ENV]))
        self._preemptible: set[str] = set()
        """Ids of requests that may be preempted; some of them may have ended."""
        self._yielding: set[str] = set()
        """Ids of yielding requests; some of them may have ended."""
        self._in_flight: deque[_Step] = deque()
        self._last_step_end = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Apply best-effort preemption and the gate's plan, then schedule as vLLM does."""
        started = time.perf_counter()
        held = self._preempt_best_effort(time.monotonic())
        yielding_prompts = bool(self._yielding) and self._hold_yielding(held)
        decoding, context, gated = self._decoding()
        sat_out: set[str] = set()
        budget: int = self.max_num_scheduled_tokens
        if gated:
            backlog = self._prefill_backlog(budget)
            plan = self._gate.plan(time.monotonic(), decoding, backlog, yielding_prompts)
            sat_out = plan.sit_out
            if plan.max_prefill_tokens is not None:
                # NOTE: cap the step's budget, not long_prefill_token_threshold, which caps each request.
                prefill = plan.max_prefill_tokens and max(plan.max_prefill_tokens, self._least_prefill_tokens())
                cap = len(decoding) - len(sat_out) + prefill
                self.max_num_scheduled_tokens = max(1, min(budget, cap))
            for request_id in sat_out:
                self._skip_step(self.requests[request_id])
        gate_seconds = time.perf_counter() - started

        output = super().schedule(*args, **kwargs)
        self.max_num_scheduled_tokens = budget
        for request in held:
            self.waiting.add_request(request)

        started = time.perf_counter()
        self._count(output, decoding, context, sat_out)
        self._reporter.report.gate_seconds += gate_seconds + time.perf_counter() - started
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Let vLLM update its state, and report how long the step took."""
        result = super().update_from_output(scheduler_output, *args, **kwargs)
        now = time.monotonic()
        if scheduler_output.total_num_scheduled_tokens and self._in_flight:
            step = self._in_flight.popleft()
            # A step begins when it is scheduled or when the one before it ends, whichever is later.
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
        """Queue the request as vLLM does, and note whether it yields and whether it may be preempted."""
        super().add_request(request)
        if self._gated_request(request).kind is ServiceKind.YIELDING:
            self._yielding.add(request.request_id)
        # NOTE: vLLM loses a resumable session that is preempted at the end of its input, and pooling has no output.
        restartable = not request.resumable and request.sampling_params is not None
        if self._preemption is not None and restartable and self._gate.preemptible(self._gated_request(request)):
            self._preemptible.add(request.request_id)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """Begin the next turn of a session as vLLM does. Its tokens are due from the new first one on."""
        super()._update_request_as_session(session, update)
        self._gate.forget(session.request_id)

    def _best_effort_preemption(self) -> BestEffortPreemption | None:
        """Return None where vLLM cannot take a request out of a running batch, or has an order of its own."""
        if self.policy != SchedulingPolicy.FCFS or self.connector is not None or self.ec_connector is not None:
            return None
        if not within(vllm.__version__, PREEMPTION_VERSIONS):
            return None
        return BestEffortPreemption(Capacity(self.max_num_active_reqs, self.kv_cache_manager.block_pool.num_gpu_blocks))

    def _preempt_best_effort(self, now: float) -> list[Request]:
        """Apply best-effort preemption; return the requests that are held out of the queue for this step."""
        if self._preemption is None or self._pause_state != PauseState.UNPAUSED:
            return []
        pool = self.kv_cache_manager.block_pool
        active = len(self.running) + self.num_waiting_for_streaming_input
        free_blocks = pool.get_num_free_blocks() - self.kv_cache_manager.watermark_blocks
        free = Capacity(self.max_num_active_reqs - active, free_blocks)
        if self._preemptible:
            self._preemptible &= self.requests.keys()
        running: list[Member] = []
        waiting: list[Member] = []
        if self._preemptible:
            running = [self._member(r) for r in self.running if r.is_prefill_chunk or r.request_id in self._preemptible]
            waiting = [self._member(r) for r in self.waiting if self._counts_as_waiting(r)]
        plan = self._preemption.plan(now, free, running, waiting)
        if plan is None:
            return []
        for request in plan.preempt:
            self._reporter.report.best_effort_preemptions += 1
            self.running.remove(request)
            self._preempt_request(request, now)
        # vLLM puts a preempted request in front of its queue; these wait their turn instead.
        self.waiting.remove_requests([*plan.front, *plan.back, *plan.held])
        for request in plan.front:
            self.waiting.prepend_request(request)
        for request in plan.back:
            self.waiting.add_request(request)
        return plan.held

    def _hold_yielding(self, held: list[Request]) -> bool:
        """Hold the prompts of yielding requests while paced or deadline-only ones have any.

        Waiting ones move from the queue to ``held``. Return whether no such prompt is there.
        """
        self._yielding &= self.requests.keys()
        late = [r for r in self.running if r.request_id in self._yielding and _is_prefilling(r)]
        if late:
            # NOTE: vLLM fills the step's budget in the order of `running`. A prompt ahead of decodes would take theirs.
            self.running = [*(r for r in self.running if r not in late), *late]
        waiting = [r for r in self.waiting if r.status in _READY]
        prompts = [*(r for r in self.running if _is_prefilling(r)), *waiting]
        if not any(self._gated_request(r).kind < ServiceKind.BEST_EFFORT for r in prompts):
            return True
        if self._pause_state == PauseState.UNPAUSED:
            moved = [r for r in waiting if r.request_id in self._yielding]
            self.waiting.remove_requests(moved)
            held += moved
            for request in late:
                self._skip_step(request)
        return False

    def _skip_step(self, request: Request) -> None:
        """Leave ``request`` out of the coming step, which `schedule` plans."""
        # NOTE: schedule() advances current_step first, so +2 skips exactly the coming step.
        request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)

    def _counts_as_waiting(self, request: Request) -> bool:
        if request.request_id in self._preemptible:
            return True
        return request.status in _READY and self._gated_request(request).kind is not ServiceKind.BEST_EFFORT

    def _member(self, request: Request) -> Member:
        return Member(
            request,
            request.request_id in self._preemptible,
            held=self._blocks(request.num_computed_tokens),
            needed=self._blocks(request.num_tokens),
            prefilling=request.is_prefill_chunk,
            preempted_before=request.num_preemptions > 0,
        )

    def _blocks(self, tokens: int) -> int:
        """Return the blocks that hold ``tokens`` in all KV groups: an upper bound where a group keeps fewer tokens."""
        return -(-tokens // int(self.block_size)) * int(self.kv_cache_manager.num_kv_cache_groups)

    def _decoding(self) -> tuple[list[_Gated], float, bool]:
        """Return the requests that would decode one token now, their summed context, and whether any is to be gated."""
        decoding: list[_Gated] = []
        context = 0.0
        any_gated = False
        for request in self.running:
            if _is_prefilling(request):
                continue
            # NOTE: with async scheduling vLLM skips a request whose last token is already scheduled. That is no
            # opportunity to decode, so it must not cost a credit.
            if (
                request.num_output_placeholders > 0
                and request.num_computed_tokens + 2 - request.num_output_placeholders
                >= request.num_prompt_tokens + request.max_tokens
            ):
                continue
            gated = self._gated_request(request)
            gated.length = request.num_tokens + request.num_output_placeholders
            decoding.append(gated)
            context += request.num_computed_tokens
            any_gated = any_gated or gated.pace_s is not None
        return decoding, context, any_gated

    def _prefill_backlog(self, limit: int) -> int:
        """Return the tokens left to compute, at most ``limit``, including what preempted requests compute again."""
        skipped = self.current_step + 2
        prefilling = [r for r in self.running if _is_prefilling(r) and r.next_decode_eligible_step < skipped]
        tokens = sum([_left(r) for r in prefilling])
        for request in self.waiting:
            # Each lookup in the prefix cache takes time, in every step.
            if tokens >= limit:
                break
            tokens += _left(request) - self._cached_tokens(request)
        return min(int(tokens), limit)

    def _least_prefill_tokens(self) -> int:
        """Return the fewest prefill tokens with which the next prompt makes progress."""
        running = (r for r in self.running if _is_prefilling(r))
        return least_prefill_tokens(self, chain(running, (r for r in self.waiting if r.status in _READY)))

    def _cached_tokens(self, request: Request) -> int:
        """Return the tokens of a waiting request that are in the prefix cache.

        NOTE: `get_computed_blocks` would count the lookup in vLLM's own statistics, once per step.
        """
        if not self.kv_cache_manager.enable_caching or not request.block_hashes:
            return 0
        return int(
            self.kv_cache_manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[1]
        )

    def _gated_request(self, request: Request) -> _Gated:
        """Return what the gate knows of the request, read from its xargs the first time."""
        known = self._gated.get(request.request_id)
        if known is not None:
            return known
        if len(self._gated) > 2 * len(self.requests) + 64:
            for request_id in self._gated.keys() - self.requests.keys():
                del self._gated[request_id]
                self._gate.forget(request_id)
        xargs = (request.sampling_params and request.sampling_params.extra_args) or {}
        given = xargs.get(TPOT_XARG)
        # A pace of 0 or infinity would give some request a TRP of 0, which never decodes again.
        pace_ms: float | None = None
        if isinstance(given, int | float) and 0 < given < math.inf:
            pace_ms = max(_MIN_PACE_MS, given)
        pace_s = None if pace_ms is None else pace_ms / 1000
        gated = self._gated[request.request_id] = _Gated(
            request_id=request.request_id,
            kind=KINDS_BY_LABEL.get(str(xargs.get(KIND_XARG)), default_kind(pace_s)),
            pace_s=pace_s,
            gate=str(xargs.get(GATE_XARG, "")),
            label=self._labels.of(pace_ms),
        )
        return gated

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


def _left(request: Request) -> int:
    return tokens_left(request.num_tokens, request.num_computed_tokens, request.num_output_placeholders)


def _is_prefilling(request: Request) -> bool:
    return is_prefilling(_left(request), request.num_computed_tokens, request.num_prompt_tokens)
