"""A simulated engine in real time: vLLM's step loop with sleeps in place of forward passes.

For development and tests. It generates nothing: its words are fixed, and every answer says so
(``system_fingerprint: "antares-simulated"``). What is real is the scheduling: continuous batching with
chunked prefill, decode first, first come first served, a token budget, KV accounting, and the step gate
before every step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from engine_adapter.engine import ASGIApp, EngineEvents, EngineState, EngineUnreachable, GateReport
from engine_adapter.simulated_app import SimulatedApp
from engine_adapter.simulated_sequence import SimulatedSequence
from engine_adapter.step_gate import GATES, StepGate
from engine_adapter.step_time import StepTimeModel, StepTimes

FALLING_BEHIND_S = 0.25
"""Steps are timed from the scheduled end of the last one; beyond this lag the clock starts afresh."""
_SHORTEST_STEP_S = 1e-4


@dataclass(slots=True)
class _Step:
    decodes: list[SimulatedSequence]
    chunks: list[tuple[SimulatedSequence, int]]
    mean_context: float
    prefill_tokens: int
    seconds: float


class SimulatedEngine:
    """An `Engine` whose steps last what ``times`` says.

    Args:
        name: the engine's name in metrics.
        model: the model name in answers and in ``/v1/models``. Requests for any model are served.
        times: a step lasts ``ITL(B, L)`` (if anything decodes) plus ``t(prefill tokens)`` (if anything
            prefills).
        max_num_seqs, max_num_batched_tokens, max_model_len: vLLM's limits of the same names.
        kv_tokens: KV cache size in tokens. A sequence is admitted once its prompt and output fit.
        gate: name in `step_gate.GATES`. Requests with a number under ``antares_tpot_ms`` in ``vllm_xargs``
            are gated.
        output_tokens: answer length for requests that do not fix it themselves: a number, a function of the
            prompt text, or None for 8 to 128 by a stable hash of the prompt.
        time_scale: every step's duration is multiplied by this.
        restart_s: seconds that the engine stays down after `crash`.

    Raises:
        ValueError: unknown gate, or a limit that is not positive.
    """

    def __init__(
        self,
        name: str = "simulated",
        model: str = "simulated",
        *,
        times: StepTimes | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int = 8192,
        kv_tokens: int = 200_000,
        gate: str = "credit",
        output_tokens: int | Callable[[str], int] | None = None,
        time_scale: float = 1.0,
        restart_s: float = 0.5,
    ) -> None:
        if gate not in GATES:
            raise ValueError(f"unknown step gate {gate!r}: use one of {', '.join(GATES)}")
        if min(max_num_seqs, max_num_batched_tokens, max_model_len, kv_tokens, time_scale) <= 0:
            raise ValueError("the simulated engine's limits and time_scale must be positive")
        self.name = name
        self.model = model
        self.times = times or StepTimes()
        self.takes_xargs = True
        self.state = EngineState(
            model=model,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_tokens=kv_tokens,
            step_time=StepTimeModel(times=self.times),
        )
        self.output_tokens = output_tokens
        self._time_scale = time_scale
        self._restart_s = restart_s
        self._gate_name = gate
        self._gate: StepGate = GATES[gate]()
        self._waiting: deque[SimulatedSequence] = deque()
        self._running: list[SimulatedSequence] = []
        self._wake = asyncio.Event()
        self._events = EngineEvents()
        self._loop_task: asyncio.Task[None] | None = None
        self._restart_task: asyncio.Task[None] | None = None
        self._app = SimulatedApp(self)

    @property
    def app(self) -> ASGIApp:
        """The OpenAI routes; see `SimulatedApp`."""
        return self._app

    async def start(self, events: EngineEvents) -> None:
        """Start stepping. Returns at once."""
        self._events = events
        self._come_up()

    async def stop(self) -> None:
        """Stop stepping; requests in flight get `EngineLost`. Idempotent."""
        self.state.alive = False
        tasks = [task for task in (self._loop_task, self._restart_task) if task is not None]
        self._loop_task = self._restart_task = None
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._lose_everyone()

    def crash(self) -> None:
        """Die now: every request in flight gets `EngineLost`. Comes back ``restart_s`` seconds later."""
        if not self.state.alive:
            return
        self.state.alive = False
        self.state.ready_in_s = self._restart_s
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._lose_everyone()
        self._restart_task = asyncio.create_task(self._restart(), name=f"{self.name}-restart")
        self._events.on_alive(False)

    def count_tokens(self, text: str) -> int | None:
        """Words between white space: what this engine takes for tokens."""
        return len(text.split())

    async def probe(self) -> None:
        """Its step times never change: learn them anew from its first guess."""
        self.state.step_time.forget()
        self.state.step_time.times = self.times

    def refuse(self, body: dict[str, Any]) -> str | None:
        """Nothing is refused."""
        return None

    def running_ids(self) -> list[str]:
        """Ids of the sequences that hold a place in the batch, oldest first."""
        return [sequence.request_id for sequence in self._running]

    def submit(self, sequences: Iterable[SimulatedSequence]) -> None:
        """Queue sequences for their prefill. Raises `EngineLost` when the engine is down."""
        if not self.state.alive:
            raise EngineUnreachable(f"the simulated engine {self.name!r} is down")
        self._waiting.extend(sequences)
        self.state.engine_waiting = len(self._waiting)
        self._wake.set()

    def abandon(self, sequences: Iterable[SimulatedSequence]) -> None:
        """Nobody waits for these any more: the next step starts without them."""
        for sequence in sequences:
            sequence.abandoned = True

    def _come_up(self) -> None:
        self._gate = GATES[self._gate_name]()
        self.state.gate = GateReport()
        self.state.ready_in_s = 0.0
        self.state.alive = True
        self._loop_task = asyncio.create_task(self._run(), name=f"{self.name}-steps")
        self._events.on_alive(True)

    async def _restart(self) -> None:
        await asyncio.sleep(self._restart_s)
        self.state.restarts += 1
        self._come_up()

    def _lose_everyone(self) -> None:
        lost = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._publish()
        for sequence in lost:
            sequence.on_lost()

    async def _run(self) -> None:
        now = time.monotonic()
        while True:
            self._drop_abandoned()
            if not self._running and not self._waiting:
                self._publish()
                self._wake.clear()
                await self._wake.wait()
                now = time.monotonic()
                continue
            step = self._plan(now)
            self._publish()
            # The next step starts where this one was due to end: late wake-ups must not add up.
            now += step.seconds
            await asyncio.sleep(max(0.0, now - time.monotonic()))
            if time.monotonic() - now > FALLING_BEHIND_S:
                now = time.monotonic()
            self._finish(step)

    def _plan(self, now: float) -> _Step:
        """Who takes part in the step at ``now``: decodes, running prefills, then the queue in order."""
        decoding = [s for s in self._running if s.prefilled >= s.prompt_tokens]
        prefilling = [s for s in self._running if s.prefilled < s.prompt_tokens]
        backlog = sum(s.prompt_tokens - s.prefilled for s in (*prefilling, *self._waiting))
        started = time.perf_counter()
        plan = self._gate.plan(now, decoding, backlog)
        self._count_gate(decoding, plan.sit_out, time.perf_counter() - started)

        decodes = [s for s in decoding if s.request_id not in plan.sit_out]
        decodes = decodes[: self.state.max_num_batched_tokens]
        budget = self.state.max_num_batched_tokens - len(decodes)
        if plan.max_prefill_tokens is not None:
            budget = min(budget, plan.max_prefill_tokens)
        chunks: list[tuple[SimulatedSequence, int]] = []
        for sequence in prefilling:
            if budget <= 0:
                break
            chunk = min(sequence.prompt_tokens - sequence.prefilled, budget)
            chunks.append((sequence, chunk))
            budget -= chunk
        reserved = sum(s.reserved for s in self._running)
        while self._waiting and budget > 0 and len(self._running) < self.state.max_num_seqs:
            if reserved + self._waiting[0].reserved > self.state.kv_tokens:
                break
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            reserved += sequence.reserved
            chunk = min(sequence.prompt_tokens, budget)
            chunks.append((sequence, chunk))
            budget -= chunk
        return self._timed(decodes, chunks)

    def _timed(self, decodes: list[SimulatedSequence], chunks: list[tuple[SimulatedSequence, int]]) -> _Step:
        context = sum(s.prompt_tokens + s.generated for s in decodes) / len(decodes) if decodes else 0.0
        prefill_tokens = sum(chunk for _, chunk in chunks)
        seconds = self.times.itl(len(decodes), context) if decodes else 0.0
        if prefill_tokens:
            seconds += self.times.prefill(prefill_tokens)
        # A gate may leave a step empty; it still takes time, or the loop would spin.
        seconds = max(seconds, _SHORTEST_STEP_S) * self._time_scale
        return _Step(decodes, chunks, context, prefill_tokens, seconds)

    def _finish(self, step: _Step) -> None:
        """The step's tokens come out; the model and the listener hear of it."""
        at = time.monotonic()
        for sequence, chunk in step.chunks:
            sequence.prefilled += chunk
        finished_prefill = [s for s, _ in step.chunks if s.prefilled >= s.prompt_tokens]
        # The step that completes a prompt also samples its first token.
        for sequence in (*step.decodes, *finished_prefill):
            if sequence.abandoned:
                continue
            sequence.generated += 1
            sequence.on_token(sequence.generated, at)
            if sequence.generated >= sequence.output_tokens:
                self._running.remove(sequence)
                self._gate.forget(sequence.request_id)
        self.state.step_time.observe(len(step.decodes), step.prefill_tokens, step.mean_context, step.seconds)
        self._publish()
        self._events.on_step()

    def _count_gate(self, decoding: list[SimulatedSequence], sit_out: set[str], seconds: float) -> None:
        report = self.state.gate
        report.steps += 1
        report.gated_steps += bool(sit_out)
        report.gate_seconds += seconds
        for sequence in decoding:
            if sequence.tpot_slo_s is None:
                continue
            bound = f"{sequence.tpot_slo_s * 1000:g}"
            report.eligible[bound] = report.eligible.get(bound, 0) + 1
            report.batched[bound] = report.batched.get(bound, 0) + (sequence.request_id not in sit_out)

    def _drop_abandoned(self) -> None:
        if any(s.abandoned for s in self._running):
            for sequence in self._running:
                if sequence.abandoned:
                    self._gate.forget(sequence.request_id)
            self._running = [s for s in self._running if not s.abandoned]
        if any(s.abandoned for s in self._waiting):
            self._waiting = deque(s for s in self._waiting if not s.abandoned)

    def _publish(self) -> None:
        self.state.engine_running = len(self._running)
        self.state.engine_waiting = len(self._waiting)
        held = sum(s.prefilled + s.generated for s in self._running)
        self.state.kv_usage = min(1.0, held / self.state.kv_tokens)
