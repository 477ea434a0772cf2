"""vLLM's scheduler class with a step gate.

    vllm serve MODEL --scheduler-cls engine_adapter.vllm_scheduler.SloScheduler

vLLM resolves the class by name inside its EngineCore process. A request states its pace in
``SamplingParams.extra_args`` (``vllm_xargs`` in an OpenAI body) as ``antares_tpot_ms``, the gate that plans for it as
``antares_gate``, and its service kind as ``antares_kind`` where the pace does not imply it. An engine without such
requests behaves exactly as stock vLLM.

Environment: ``ANTARES_GATE`` names the gate of requests that name none (``credit``, the default, ``slack`` or
``open``). ``ANTARES_GATE_SOCKET`` is where reports go in a gateway's own engine. In a server, gateways that have the
key ``ANTARES_REPORT_KEY`` get them at ``ANTARES_REPORT_ADDRESS``.
"""

from __future__ import annotations

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

from engine_adapter.gates.base import StepPlan
from engine_adapter.gates.best_effort_preemption import BestEffortPreemption, Capacity, Member
from engine_adapter.gates.composite import Gates
from engine_adapter.gates.drafts import fit_drafts
from engine_adapter.report_channel.messages import EngineLimits, QueueReport
from engine_adapter.service_kind import ServiceKind
from engine_adapter.step_report import StepReport
from engine_adapter.vllm.features import check_server
from engine_adapter.vllm.gate_channel import GateReporter
from engine_adapter.vllm.gated import Gated, GatedRequests, left, prefilling
from engine_adapter.vllm.kv_groups import KvGroups
from engine_adapter.vllm.orphan import PARENT_ENV, exit_with_parent
from engine_adapter.vllm.unsplittable import least_prefill_tokens
from engine_adapter.vllm.versions import PREEMPTION_VERSIONS, require_gate, within

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

GATE_ENV = "ANTARES_GATE"
_READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""Statuses of requests that wait for a slot only; others wait for a grammar or for more input."""

require_gate(vllm.__version__)


@dataclass(slots=True)
class _Step:
    """A scheduled step whose result is pending; ``planned`` lacks its duration and the accepted drafts."""

    planned: StepReport
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
        self._gated = GatedRequests(self._gate.forget)
        self._preemption = self._best_effort_preemption()
        self._reporter = GateReporter.from_env()
        self._reporter.report.preemptible = self._preemption is not None
        if within(vllm.__version__, PREEMPTION_VERSIONS):
            self._kv_groups = KvGroups(self.kv_cache_manager, self.vllm_config)
            self._reporter.report.kv_tokens = self._kv_groups.capacity_tokens
        if PARENT_ENV in os.environ:
            # This process belongs to a gateway; if the gateway is killed, nothing else would stop it.
            exit_with_parent(int(os.environ[PARENT_ENV]))
        self._reporter.serve(self._limits(), self._queue, self.vllm_config.parallel_config.data_parallel_size)
        self._preemptible: set[str] = set()
        """Ids of requests that may be preempted; some of them may have ended."""
        self._yielding: set[str] = set()
        """Ids of yielding requests; some of them may have ended."""
        self._in_flight: deque[_Step] = deque()
        self._last_step_end = 0.0
        self._blocked = False
        """Whether the last step computed nothing, because only held chunks of yielding requests run."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Apply best-effort preemption and the gate's plan, then schedule as vLLM does."""
        started = time.perf_counter()
        held = self._preempt_best_effort(time.monotonic())
        yielding_prompts = bool(self._yielding) and self._hold_yielding(held)
        decoding, plan = self._decoding(), StepPlan()
        budget: int = self.max_num_scheduled_tokens
        if any(gated.pace_s is not None for gated in decoding):
            self._decodes_first()
            plan = self._gate.plan(time.monotonic(), decoding, self._prefill_backlog(budget), yielding_prompts)
            decode_tokens = fit_drafts(decoding, plan, budget)
            if plan.max_prefill_tokens is not None:
                # NOTE: cap the step's budget, not long_prefill_token_threshold, which caps each request.
                prefill = plan.max_prefill_tokens and max(plan.max_prefill_tokens, self._least_prefill_tokens())
                self.max_num_scheduled_tokens = max(1, min(budget, decode_tokens + prefill))
            for request_id in plan.sit_out:
                self._skip_step(self.requests[request_id])
            for request_id in plan.drafts.keys() - plan.sit_out:
                request = self.requests[request_id]
                request.spec_token_ids = request.spec_token_ids[: plan.drafts[request_id]]
        gate_seconds = time.perf_counter() - started

        output = super().schedule(*args, **kwargs)
        self.max_num_scheduled_tokens = budget
        for request in held:
            self.waiting.add_request(request)

        started = time.perf_counter()
        self._blocked = not output.total_num_scheduled_tokens and self._only_held_chunks()
        self._drop_lost_drafts(output, decoding)
        self._count(output, decoding, plan.sit_out)
        self._reporter.report.gate_seconds += gate_seconds + time.perf_counter() - started
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """Let vLLM update its state, and report what the step computed and how long it took."""
        accepted = _accepted(scheduler_output, model_runner_output)
        result = super().update_from_output(scheduler_output, model_runner_output)
        now = time.monotonic()
        if scheduler_output.total_num_scheduled_tokens and self._in_flight:
            step = self._in_flight.popleft()
            # A step begins when it is scheduled or when the one before it ends, whichever is later.
            elapsed = now - max(step.scheduled_at, self._last_step_end)
            report = step.planned._replace(elapsed_s=elapsed, accepted_tokens=accepted)
            self._reporter.step(now, report)
            started = time.perf_counter()
            self._gate.observe(report)
            self._gated.drop_ended(self.requests, len(self.requests))
            self._reporter.report.gate_seconds += time.perf_counter() - started
        self._last_step_end = now
        if not self.running:
            self._reporter.flush(now)
        return result

    def add_request(self, request: Request) -> None:
        """Queue the request as vLLM does, and note whether it yields and whether it may be preempted."""
        super().add_request(request)
        if self._gated.of(request).kind is ServiceKind.YIELDING:
            self._yielding.add(request.request_id)
        # NOTE: vLLM loses a resumable session that is preempted at the end of its input, and pooling has no output.
        restartable = not request.resumable and request.sampling_params is not None
        if self._preemption is not None and restartable and self._gate.preemptible(self._gated.of(request)):
            self._preemptible.add(request.request_id)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """Begin the next turn of a session as vLLM does. Its tokens are due from the new first one on."""
        super()._update_request_as_session(session, update)
        self._gate.forget(session.request_id)

    def _limits(self) -> EngineLimits:
        """Return what a gateway that uses this server must know of the engine."""
        config, report = self.vllm_config, self._reporter.report
        return EngineLimits(
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            max_model_len=config.model_config.max_model_len,
            kv_tokens=report.kv_tokens,
            prefix_caching=bool(config.cache_config.enable_prefix_caching),
            plans_ahead=bool(config.scheduler_config.async_scheduling),
            preemptible=report.preemptible,
        )

    def _queue(self) -> QueueReport:
        pool, running = self.kv_cache_manager.block_pool, len(self.running)
        usage = 1 - pool.get_num_free_blocks() / max(1, pool.num_gpu_blocks)
        return QueueReport(running, len(self.requests) - running, min(1.0, max(0.0, usage)))

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

        Waiting ones move from the queue to ``held``. Return whether no such prompt is there, or none can be computed:
        the held chunks have the slots or the memory, so they continue for one step.
        """
        self._yielding &= self.requests.keys()
        self._decodes_first()
        waiting = [r for r in self.waiting if r.status in _READY]
        chunks = [r for r in self.running if prefilling(r)]
        prompts = [*chunks, *waiting]
        if not any(self._gated.of(r).kind < ServiceKind.BEST_EFFORT for r in prompts):
            return True
        if self._pause_state == PauseState.UNPAUSED:
            moved = [r for r in waiting if r.request_id in self._yielding]
            self.waiting.remove_requests(moved)
            held += moved
            for request in chunks:
                if request.request_id in self._yielding and not self._blocked:
                    self._skip_step(request)
        return self._blocked

    def _only_held_chunks(self) -> bool:
        """Whether all running requests are yielding ones with a prompt. A request that ends still has its slot."""
        return bool(self.running) and all(prefilling(r) and r.request_id in self._yielding for r in self.running)

    def _decodes_first(self) -> None:
        """Move decodes ahead of chunks, and the chunks of yielding requests to the end.

        NOTE: vLLM fills the step's budget in the order of `running`. A chunk ahead of decodes would take theirs.
        """
        chunks = [r for r in self.running if prefilling(r)]
        if chunks and (self._yielding or self.running[-len(chunks) :] != chunks):
            chunks.sort(key=lambda request: request.request_id in self._yielding)
            self.running = [*(r for r in self.running if not prefilling(r)), *chunks]

    def _skip_step(self, request: Request) -> None:
        """Leave ``request`` out of the coming step, which `schedule` plans."""
        # NOTE: schedule() advances current_step first, so +2 skips exactly the coming step.
        request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)

    def _counts_as_waiting(self, request: Request) -> bool:
        if request.request_id in self._preemptible:
            return True
        return request.status in _READY and self._gated.of(request).kind is not ServiceKind.BEST_EFFORT

    def _member(self, request: Request) -> Member:
        return Member(
            request,
            request.request_id in self._preemptible,
            held=self._kv_groups.held(request),
            needed=self._kv_groups.needed(request.num_tokens),
            prefilling=request.is_prefill_chunk,
            preempted_before=request.num_preemptions > 0,
        )

    def _decoding(self) -> list[Gated]:
        """Return the requests that would decode now."""
        decoding: list[Gated] = []
        drafts_in_flight = 1 + self.num_spec_tokens
        for request in self.running:
            if prefilling(request):
                continue
            # NOTE: vLLM skips a request whose last token is already scheduled, or one that waits for another stage of
            # the pipeline. That is no opportunity to decode, so it must not cost a credit.
            in_flight = request.num_output_placeholders
            if left(request) < 1 or request.next_decode_eligible_step > self.current_step + 1:
                continue
            if in_flight > 0 and request.num_computed_tokens + 2 - in_flight >= (
                request.num_prompt_tokens + request.max_tokens
            ):
                continue
            gated = self._gated.of(request)
            # Each step in flight brings one token, and the drafts that are accepted.
            gated.length = request.num_tokens - (-in_flight // drafts_in_flight)
            gated.drafts = len(request.spec_token_ids)
            decoding.append(gated)
        return decoding

    def _prefill_backlog(self, limit: int) -> int:
        """Return the tokens left to compute, at most ``limit``, including what preempted requests compute again."""
        skipped = self.current_step + 2
        tokens = sum([left(r) for r in self.running if prefilling(r) and r.next_decode_eligible_step < skipped])
        for request in self.waiting:
            # Each lookup in the prefix cache takes time, in every step.
            if tokens >= limit:
                break
            tokens += left(request) - self._cached_tokens(request)
        return min(int(tokens), limit)

    def _least_prefill_tokens(self) -> int:
        """Return the fewest prefill tokens with which the next prompt makes progress."""
        skipped = self.current_step + 2
        running = (r for r in self.running if prefilling(r) and r.next_decode_eligible_step < skipped)
        waiting = (r for r in self.waiting if r.status in _READY)
        return least_prefill_tokens(self, chain(running, waiting), self._cached_tokens)

    def _cached_tokens(self, request: Request) -> int:
        """Return the tokens of a waiting request that are in the prefix cache.

        NOTE: `get_computed_blocks` would count the lookup in vLLM's own statistics, once per step.
        """
        if not self.kv_cache_manager.enable_caching or not request.block_hashes:
            return 0
        return int(
            self.kv_cache_manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[1]
        )

    def _drop_lost_drafts(self, output: SchedulerOutput, decoding: list[Gated]) -> None:
        """Drop the drafts of the requests that the step leaves out, where the worker keeps only those of its last step.

        Otherwise their next step would verify garbage.
        """
        if not self.num_spec_tokens or getattr(self, "use_v2_model_runner", False):
            return
        for gated in decoding:
            request = self.requests[gated.request_id]
            placeholders = bool(request.spec_token_ids) and request.spec_token_ids[0] < 0
            if placeholders and gated.request_id not in output.num_scheduled_tokens:
                request.spec_token_ids = []

    def _count(self, output: SchedulerOutput, decoding: list[Gated], sat_out: set[str]) -> None:
        """Count the step's decodes by pace, and what it computes."""
        scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        if not output.total_num_scheduled_tokens:
            return
        report = self._reporter.report
        report.steps += 1
        report.gated_steps += bool(sat_out)
        decoded: set[str] = set()
        context = offered = 0
        for gated in decoding:
            report.eligible[gated.label] = report.eligible.get(gated.label, 0) + 1
            if gated.request_id in scheduled:
                decoded.add(gated.request_id)
                context += gated.length
                offered += gated.drafts > 0
                report.batched[gated.label] = report.batched.get(gated.label, 0) + 1
        # vLLM pads a prompt with one token left to compute with placeholders. These are no drafts of a decode.
        draft_tokens = sum([len(of) for name, of in drafts.items() if name in decoded])
        prefill_tokens = output.total_num_scheduled_tokens - len(decoded) - draft_tokens
        recomputed = 0
        if prefill_tokens:
            chunks = [name for name in scheduled if name not in decoded and self.requests[name].num_preemptions]
            recomputed = sum([scheduled[name] - len(drafts.get(name, ())) for name in chunks])
        planned = StepReport(
            len(decoded),
            prefill_tokens,
            context / len(decoded) if decoded else 0.0,
            0.0,
            drafting_requests=len(decoded & drafts.keys()),
            draft_tokens=draft_tokens,
            recomputed_tokens=recomputed,
            offered_requests=offered,
        )
        self._in_flight.append(_Step(planned, time.monotonic()))


def _accepted(output: SchedulerOutput, result: ModelRunnerOutput) -> int:
    """Return the drafts of a step that were accepted: a request with drafts gets one token and those."""
    if not result.sampled_token_ids:
        return 0
    return sum(
        [max(0, len(result.sampled_token_ids[result.req_id_to_index[name]]) - 1)
         for name in output.scheduled_spec_decode_tokens]
    )  # fmt: skip
