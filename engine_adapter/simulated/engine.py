"""A simulated engine in real time: vLLM's step loop, with sleeps instead of forward passes.

For development and tests. No model runs: the output is fixed words, and every response has
``system_fingerprint: "antares-simulated"``. The scheduling is real (`engine_adapter.simulated.scheduler`). It has
continuous batching with chunked prefill, a token budget per step, KV blocks with prefix caching and preemption, and the
step gate. Decodes go first, and prompts are served first come, first served.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from engine_adapter.engine import ASGIApp, EngineEvents, EngineState, EngineUnreachable, RenderedPrompt
from engine_adapter.gates.composite import Gates
from engine_adapter.gates.pace_labels import PaceLabels
from engine_adapter.model_card import ModelCard
from engine_adapter.simulated.app import SimulatedApp
from engine_adapter.simulated.request import BadRequest, Completion
from engine_adapter.simulated.scheduler import BLOCK_TOKENS, SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.simulated.step import Step
from engine_adapter.step_report import GateReport
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import Profile

MAX_LAG_S = 0.25
"""Largest lag (s) of the step loop behind its schedule. Beyond it the schedule restarts from the current time."""
_MIN_STEP_S = 1e-4
_TOKEN_MASK = 0xFFFFFFFF  # token ids have 32 bits
_DEFAULT_LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_model_len": 8192, "kv_tokens": 200_000}


def _limits(profile: Profile | None, **given: int | None) -> dict[str, Any]:
    """The given limits. A limit that is None comes from the profile, or is the default."""
    fallback = _DEFAULT_LIMITS if profile is None else {name: getattr(profile, name) for name in _DEFAULT_LIMITS}
    return {name: fallback[name] if limit is None else limit for name, limit in given.items()}


class SimulatedEngine:
    """An engine with simulated step times. Implements `engine_adapter.engine.Engine`.

    Args:
        name: the engine's name in metrics.
        model: the name of the default model. It answers requests for models that the engine does not have.
        models: names of further models. All behave alike.
        aliases: names that clients of the gateway may use, each with the engine's own name of that model.
        times: a step takes ``ITL(B, L)`` if any sequence decodes, plus ``t(prefill tokens)`` if any prompt prefills.
        profile: step times from a profile, in place of ``times``.
        max_num_seqs, max_num_batched_tokens, max_model_len: vLLM's limits of the same names. Defaults: the profile's,
            or 256, 2048 and 8192.
        kv_tokens: KV cache size in tokens, at least ``max_model_len``. Default: the profile's, or 200,000. If it is
            full, the newest sequence is preempted.
        gate: gate for requests that name none; a name in `gates.composite.GATES`.
        output_tokens: output length of requests that do not set one: a number, a function of the prompt text, or None
            for 8 to 128 tokens by a stable hash of the prompt.
        prefix_caching: whether prompts share the KV memory of equal beginnings, as vLLM's option of that name.
        time_scale: factor on every step's duration.
        restart_s: downtime after `crash`, in seconds.

    Raises:
        ValueError: the gate is unknown, or a limit or ``time_scale`` is not positive.
    """

    def __init__(
        self,
        name: str = "simulated",
        model: str = "simulated",
        *,
        models: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        times: StepTimes | None = None,
        profile: Profile | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        kv_tokens: int | None = None,
        gate: str = "credit",
        output_tokens: int | Callable[[str], int] | None = None,
        prefix_caching: bool = True,
        time_scale: float = 1.0,
        restart_s: float = 0.5,
    ) -> None:
        limits = _limits(
            profile,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_tokens=kv_tokens,
        )
        if min(*limits.values(), time_scale) <= 0:
            raise ValueError("the simulated engine's limits and time_scale must be positive")
        self.name = name
        self.model = model
        self.times = times or (StepTimes() if profile is None else profile.step_times())
        self.takes_xargs = self.watches_disconnect = True
        self.state = EngineState(
            aliases=dict(aliases or {}),
            reacts_late=True,
            step_time=StepTimeModel(times=self.times),
            **limits,
        )
        limit = self.state.max_model_len
        self.state.set_models([ModelCard(name, limit, "antares") for name in dict.fromkeys((model, *models))])
        self.output_tokens = output_tokens
        self.state.prefix_caching = prefix_caching
        self._time_scale = time_scale
        self._restart_s = restart_s
        self._gate_name = gate
        self._profile = profile
        self._scheduler = SimulatedScheduler(**limits, gate=Gates(gate), prefix_caching=prefix_caching)
        self._pace_labels = PaceLabels()
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
        self._bring_up()

    async def stop(self) -> None:
        """Stop stepping. Requests in flight get `EngineLost`. Idempotent."""
        self.state.alive = False
        tasks = [task for task in (self._loop_task, self._restart_task) if task is not None]
        self._loop_task = self._restart_task = None
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._fail_all_requests()

    def crash(self) -> None:
        """Simulate a crash: every request in flight gets `EngineLost`. The engine restarts after ``restart_s``."""
        if not self.state.alive:
            return
        self.state.alive, self.state.why_down = False, "it crashed and restarts"
        self.state.ready_in_s = self._restart_s
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._fail_all_requests()
        self._restart_task = asyncio.create_task(self._restart(), name=f"{self.name}-restart")
        self._events.on_alive(False)

    def hang(self, noticed_in_s: float) -> None:
        """Simulate a hang: no step is computed any more, and in ``noticed_in_s`` a watchdog restarts the engine."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        asyncio.get_running_loop().call_later(noticed_in_s, self._on_hang, self._loop_task)

    def _on_hang(self, loop_task: asyncio.Task[None] | None) -> None:
        if self.state.alive and loop_task is self._loop_task:
            self.state.hangs += 1
            self.crash()
            self.state.why_down = "it hung and restarts"

    async def render(self, path: str, document: dict[str, Any]) -> RenderedPrompt | None:
        """Return the prompt of a chat or a text completion, with a number for each of its tokens."""
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return None
        try:
            prompts = Completion.of(document, path == "/v1/chat/completions").prompts
        except BadRequest:
            return RenderedPrompt((), 0, invalid=True)
        longest = max(prompts, key=lambda prompt: prompt.size)
        too_long = longest.size >= self.state.max_model_len
        token_ids = [hash(token) & _TOKEN_MASK for token in longest.tokens]
        return RenderedPrompt(token_ids, BLOCK_TOKENS, handle=prompts, invalid=too_long)

    async def count_tokens(self, document: dict[str, Any]) -> int | None:
        """Return None: `render` tells the size of each prompt."""
        return None

    async def probe(self) -> None:
        """Reset the step-time model to the simulated step times, which never change."""
        self.state.step_time.start_over(self.times)

    def unsupported_reason(self, body: dict[str, Any]) -> str | None:
        """Returns None: every request is supported."""
        return None

    def submit(self, sequences: Iterable[SimulatedSequence]) -> None:
        """Queue sequences for prefill. Raises `EngineUnreachable` if the engine is down."""
        if not self.state.alive:
            raise EngineUnreachable(f"the simulated engine {self.name!r} is down")
        for sequence in sequences:
            self._scheduler.submit(sequence)
        self.state.engine_waiting = self._scheduler.waiting
        self._wake.set()

    def abandon(self, sequences: Iterable[SimulatedSequence]) -> None:
        """Abort sequences. They are removed before the next step."""
        for sequence in sequences:
            sequence.abandoned = True

    def _bring_up(self) -> None:
        self._scheduler.gate = Gates(self._gate_name)
        self._pace_labels = PaceLabels()
        self.state.gate = GateReport(preemptible=True)
        self.state.ready_in_s = 0.0
        self.state.alive = True
        self._loop_task = asyncio.create_task(self._run(), name=f"{self.name}-steps")
        self._events.on_alive(True)

    async def _restart(self) -> None:
        await asyncio.sleep(self._restart_s)
        self.state.restarts += 1
        self._bring_up()

    def _fail_all_requests(self) -> None:
        lost = self._scheduler.clear()
        self._publish_load()
        for sequence in lost:
            sequence.on_lost()

    async def _run(self) -> None:
        now = time.monotonic()
        while True:
            self._scheduler.drop_abandoned()
            if not self._scheduler.running and not self._scheduler.waiting:
                self._publish_load()
                self._wake.clear()
                await self._wake.wait()
                now = time.monotonic()
                continue
            started = time.perf_counter()
            step = self._scheduler.plan(now)
            self._update_gate_report(step, time.perf_counter() - started)
            seconds = self._duration_s(step)
            self._publish_load()
            # The next step starts when this one was due to end, so that late wake-ups do not accumulate.
            now += seconds
            await asyncio.sleep(max(0.0, now - time.monotonic()))
            if time.monotonic() - now > MAX_LAG_S:
                now = time.monotonic()
            self._finish(step, seconds)

    def _duration_s(self, step: Step) -> float:
        decodes = len(step.decodes)
        if self._profile is not None:
            seconds = self._profile.step_seconds(
                decodes, step.decode_context, step.prefill_tokens, step.prefill_context, max(1, len(step.chunks))
            )
        else:
            seconds = self.times.itl(decodes, step.decode_context / decodes) if decodes else 0.0
            if step.prefill_tokens:
                seconds += self.times.prefill(step.prefill_tokens)
        # A gate may leave a step empty. Without a minimum duration the loop would spin.
        return max(seconds, _MIN_STEP_S) * self._time_scale

    def _finish(self, step: Step, seconds: float) -> None:
        """Deliver the step's tokens and report the step to the model, the gate and the gateway."""
        self.state.last_step_at = at = time.monotonic()
        for sequence in (*step.decodes, *self._scheduler.finish(step).prefilled):
            if not sequence.abandoned:
                sequence.on_token(sequence.generated, at)
        report = step.report(seconds)
        self.state.observe_step(report)
        self._scheduler.gate.observe(report)
        self._publish_load()
        self._events.on_step()

    def _update_gate_report(self, step: Step, seconds: float) -> None:
        report = self.state.gate
        report.steps += 1
        report.gated_steps += bool(step.sat_out)
        report.best_effort_preemptions = self._scheduler.best_effort_preemptions
        report.gate_seconds += seconds
        for sequence in self._scheduler.decoding:
            if sequence.pace_s is None:
                continue
            label = self._pace_labels.of(sequence.pace_s * 1000)
            report.eligible[label] = report.eligible.get(label, 0) + 1
            report.batched[label] = report.batched.get(label, 0) + (sequence.request_id not in step.sat_out)

    def _publish_load(self) -> None:
        self.state.engine_running = self._scheduler.running
        self.state.engine_waiting = self._scheduler.waiting
        self.state.kv_usage = self._scheduler.kv_usage
