"""The in-process vLLM engine: AsyncLLM and vLLM's own OpenAI app, with our scheduler class inside its EngineCore.

The EngineCore runs in a child process. If it dies, its requests end with `EngineLost`, and this module rebuilds the
engine with back-off. One that hangs is killed first. The gateway continues to serve meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from engine_adapter.engine import (
    OBSERVER_KEY,
    ASGIApp,
    EngineEvents,
    EngineLost,
    EngineStartError,
    EngineState,
    EngineUnreachable,
    Receive,
    RenderedPrompt,
    Scope,
    Send,
    TokenObserver,
)
from engine_adapter.model_card import read_cards
from engine_adapter.step_report import GateReport, StepReport
from engine_adapter.step_time.calibration import PROBE_S, calibrate, warm_up
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.vllm import openai_app
from engine_adapter.vllm.adapter_calls import AdapterCalls
from engine_adapter.vllm.gate_channel import GateListener
from engine_adapter.vllm.kv_events import receive_events, subscription
from engine_adapter.vllm.launch import command_line, create_llm, freeze_heap, prepare_environment, shut_down
from engine_adapter.vllm.rendering import PromptRenderer, reuse_renderings
from engine_adapter.vllm.token_observation import observe_outputs
from engine_adapter.vllm.watchdog import Watchdog, core_pids, kill, pending, usage

log = logging.getLogger("antares.engine.vllm")

_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before each restart attempt; the last value repeats."""
FIRST_ANSWERS_S = 180.0
"""Time limit (s) for the first synthetic requests of a new engine. NOTE: calls into an engine that dies then hang."""
HEALTH_CHECK_S = 0.1
"""Seconds between checks whether the engine has died or hangs."""

_LORA_PATHS = ("/load_lora_adapter", "/unload_lora_adapter")
"""Routes that change which models vLLM serves."""

_create_lock = threading.Lock()


class VllmEngine:
    """In-process vLLM. Implements `engine_adapter.engine.Engine`.

    Args:
        name: the engine's name in metrics.
        model: a model folder, a hub id, or `models.BUILTIN`.
        flags: flags of `vllm serve`, without dashes (``{"max-model-len": 2048, "enforce-eager": True}``).
        served_model_name: the model's name for clients, or several; default ``model``.
        aliases: names that clients of the gateway may use, each with the engine's own name of that model.
        any_model: serve requests for models that vLLM does not list.
        gate: gate for requests that name none; a name in `gates.composite.GATES`.
        step_times: initial coefficients of the step-time model.
        calibrate: run a few synthetic requests after each start, so that the model is fitted before traffic arrives.
        hang_timeout_s: shortest time without a step after which an engine with work is restarted; None: never.
    """

    watches_disconnect = True
    takes_xargs = False  # `_serve` reads them from the scope, so that every route has them

    def __init__(
        self,
        name: str,
        model: str,
        flags: dict[str, Any] | None = None,
        *,
        served_model_name: str | Sequence[str] | None = None,
        aliases: Mapping[str, str] | None = None,
        any_model: bool = False,
        gate: str = "credit",
        step_times: StepTimes | None = None,
        calibrate: bool = True,
        hang_timeout_s: float | None = 5.0,
    ) -> None:
        self.name = name
        names = [served_model_name] if isinstance(served_model_name, str) else list(served_model_name or ())
        self.state = EngineState(
            model=names[0] if names else model,
            aliases=dict(aliases or {}),
            any_model=any_model,
            reacts_late=True,
            step_time=StepTimeModel(times=step_times or StepTimes()),
        )
        self._model = model
        self._served_model_names = names
        self._flags = dict(flags or {})
        self._gate = gate
        self._calibrate = calibrate
        self._events = EngineEvents()
        self._listener: GateListener | None = None
        self._llm: Any = None
        self._vllm_app: Any = None
        self._renderer: PromptRenderer | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._watchdog = Watchdog(hang_timeout_s, self.state.step_time)
        self._adapter_calls = AdapterCalls(self._on_adapters_changed)
        self._kv_events: asyncio.Task[None] | None = None
        self._sequences: dict[str, TokenObserver] = {}
        self._on_cpu = False
        self._older_children: set[Any] = set()

    @property
    def app(self) -> ASGIApp:
        """vLLM's OpenAI app, with token observation."""
        return self._serve

    # --- lifecycle ----------------------------------------------------------------------------------------------

    async def start(self, events: EngineEvents) -> None:
        """Build the engine, which takes tens of seconds. Afterwards restart it whenever it dies."""
        self._events = events
        self._listener = GateListener(self._on_gate_report)
        self._listener.open(asyncio.get_running_loop())
        try:
            await self._build()
        except BaseException:
            await self.stop()
            raise
        self._watcher = asyncio.create_task(self._restart_on_failure(), name=f"watch {self.name}")

    async def stop(self) -> None:
        """Shut down the EngineCore. Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._watcher
            self._watcher = None
        if self._llm is None:
            # The engine may be starting in a thread. A thread cannot be cancelled, but it ends with its EngineCore.
            for child in set(multiprocessing.active_children()) - self._older_children:
                child.terminate()
        await self._tear_down()

    async def _build(self) -> None:
        """Start a new EngineCore. Raises `EngineStartError` for every failure."""
        started = time.monotonic()
        try:
            # In a thread, because importing vLLM and starting its EngineCore take tens of seconds, and the gateway must
            # serve meanwhile. AsyncLLM creates its output task on first use, on the event loop.
            self._llm, args = await asyncio.to_thread(self._create_llm)
            async with asyncio.timeout(FIRST_ANSWERS_S):
                await self._prepare(args)
            freeze_heap()
        except EngineStartError:
            raise
        except Exception as error:
            raise EngineStartError(f"vLLM started but then failed ({type(error).__name__}: {error})") from error
        self.state.alive = True
        self.state.ready_in_s = time.monotonic() - started
        log.info("engine %s ready in %.0f s", self.name, time.monotonic() - started)
        self._events.on_alive(True)

    async def _prepare(self, args: Any) -> None:
        """Build vLLM's OpenAI app, hook token observation into it, and calibrate the step-time model."""
        self._watchdog.restart()
        self._vllm_app = vllm_app = await openai_app.build(self._llm, args)
        observe_outputs(self._llm.output_processor, self._sequences)
        self._read_limits()
        await self._read_models()
        reuse_renderings(vllm_app.state.online_renderer.renderer)
        self._subscribe(self._llm.vllm_config.kv_events_config)
        self._renderer = PromptRenderer(vllm_app.state, self._llm.vllm_config.cache_config.block_size)
        if self._calibrate:
            await warm_up(self._run_synthetic, self.state.step_time)
            await calibrate(self._run_synthetic, self.state.step_time, self.state.max_num_seqs)

    def _create_llm(self) -> tuple[Any, Any]:
        # One engine at a time, because an EngineCore inherits its settings from this process's environment.
        with _create_lock:
            self._older_children = set(multiprocessing.active_children())
            if self._listener is None:
                raise EngineStartError("the engine was stopped during its start")
            prepare_environment(self._listener.path, self._gate)
            arguments = command_line(self._model, self._served_model_names, self._flags)
            return create_llm(arguments, self._on_scheduler_stats, stopped=lambda: self._listener is None)

    def _subscribe(self, config: Any) -> None:
        """Receive the events of the prefix cache, if vLLM publishes them."""
        where = subscription(config)
        if where is not None:
            receiving = receive_events(*where, self._events.on_prefix_cache)
            self._kv_events = asyncio.create_task(receiving, name=f"{self.name}-kv-events")

    async def _tear_down(self) -> None:
        self.state.alive = False
        if self._kv_events is not None:
            self._kv_events.cancel()
            self._kv_events = None
        llm, self._llm, self._vllm_app, self._renderer = self._llm, None, None, None
        self._adapter_calls.cancel()
        if llm is not None:
            await shut_down(llm)
        self._sequences.clear()
        self.state.engine_running = self.state.engine_waiting = 0
        self.state.kv_usage = 0.0

    async def _restart_on_failure(self) -> None:
        checked = time.monotonic()
        while True:
            await asyncio.sleep(HEALTH_CHECK_S)
            before, checked, llm = checked, time.monotonic(), self._llm
            if llm is None:
                continue
            if llm.errored:
                self._mark_dead(llm)
            elif await self._is_hung(llm, checked - before):
                self.state.hangs += 1
                self._mark_dead(llm, f"hung for {self._watchdog.silent_s:.0f} s")
                # NOTE: it walks the process tree, which takes milliseconds.
                await asyncio.to_thread(kill, core_pids(llm))
            else:
                continue
            await self._restart()

    async def _is_hung(self, llm: Any, elapsed_s: float) -> bool:
        """Whether ``llm`` hangs. ``elapsed_s``: seconds since the previous call."""
        sequences, prompt_tokens = pending(llm)
        # The EngineCore computes no step while it loads an adapter.
        loading = bool(self._adapter_calls)
        if not sequences and not loading:
            return False
        watchdog = self._watchdog
        watchdog.add_silence(elapsed_s)
        if watchdog.wants_usage:
            watchdog.on_usage(await asyncio.to_thread(usage, core_pids(llm)))
        return watchdog.is_hung(sequences, prompt_tokens, self.state.max_num_batched_tokens, loading)

    def _mark_dead(self, llm: Any, why: str = "died") -> None:
        """Report that ``llm`` died or hung. Ignored for an earlier engine, whose requests may end after a restart."""
        if self.state.alive and llm is self._llm:
            log.error("engine %s %s", self.name, why)
            self.state.alive, self.state.why_down = False, f"it {why} and restarts"
            self._events.on_alive(False)

    async def _restart(self) -> None:
        for attempt in range(10**9):
            await self._tear_down()
            wait = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
            log.info("restarting engine %s in %.0f s", self.name, wait)
            await asyncio.sleep(wait)
            self.state.restarts += 1
            try:
                await self._build()
                return
            except EngineStartError as error:
                self.state.why_down = f"its restart failed: {error}"
                log.error("restart of engine %s failed: %s", self.name, error)

    async def _read_models(self) -> None:
        """Read the models that vLLM serves: its base model's names, and the LoRA adapters that are loaded."""
        if self._vllm_app is not None:
            listing = await self._vllm_app.state.openai_serving_models.show_available_models()
            self.state.set_models(read_cards(listing.model_dump()))

    def _read_limits(self) -> None:
        config = self._llm.vllm_config
        state = self.state
        state.max_num_seqs = config.scheduler_config.max_num_seqs
        state.max_num_batched_tokens = config.scheduler_config.max_num_batched_tokens
        state.max_model_len = config.model_config.max_model_len
        cache = config.cache_config
        # Where the gate reports the memory, its figure replaces this one. Older versions do not have vLLM's own.
        state.kv_tokens = getattr(cache, "kv_cache_size_tokens", 0) or (cache.num_gpu_blocks or 0) * cache.block_size
        self._on_cpu = config.device_config.device_type == "cpu"
        state.prefix_caching = bool(config.cache_config.enable_prefix_caching)
        state.plans_ahead = bool(config.scheduler_config.async_scheduling)

    async def _run_synthetic(self, prompt_tokens: int, output_tokens: int, salt: int) -> None:
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": [10 + (salt * 37 + i * i) % 900 for i in range(prompt_tokens)]}
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        name = f"calibrate-{salt}-{time.monotonic_ns()}"
        async for _ in self._llm.generate(prompt, params, request_id=name):
            pass

    async def count_tokens(self, document: dict[str, Any]) -> int | None:
        """Return None: `render` tells the size of each prompt."""
        return None

    async def probe(self) -> None:
        """Run synthetic requests for about `PROBE_S` seconds and refit the step-time model to them."""
        if not self.state.alive or self._sequences:
            return
        with contextlib.suppress(Exception):  # if the engine dies, `_restart_on_failure` handles it
            self.state.step_time.forget()
            await calibrate(self._run_synthetic, self.state.step_time, self.state.max_num_seqs, PROBE_S)

    # --- queries --------------------------------------------------------------------------------------------------

    async def render(self, path: str, document: dict[str, Any]) -> RenderedPrompt | None:
        """Return the prompt of ``document`` as vLLM renders it; None while the engine is down."""
        return None if self._renderer is None else await self._renderer.render(path, document)

    def unsupported_reason(self, body: dict[str, Any]) -> str | None:
        """Reason to reject a per-request seed on CPU; None for every other request.

        NOTE: vLLM's EngineCore on CPU dies on a per-request seed. Greedy decoding ignores the seed, so it is removed
        from ``body`` at temperature 0.
        """
        if not self._on_cpu or body.get("seed") is None:
            return None
        if body.get("temperature") == 0:
            del body["seed"]
            return None
        return (
            "seed: vLLM on CPU does not support a per-request seed when sampling. "
            "Remove `seed`, or send `temperature: 0` for deterministic output."
        )

    # --- one request ------------------------------------------------------------------------------------------------

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        vllm_app, llm = self._vllm_app, self._llm
        if vllm_app is None or llm is None or llm.errored:
            self._mark_dead(llm)
            raise EngineUnreachable(f"engine {self.name} is down")
        observer: TokenObserver | None = scope.get(OBSERVER_KEY)
        for_adapter = scope["path"].endswith(_LORA_PATHS)
        call = openai_app.call(vllm_app, scope, receive, send, lambda: llm is not self._llm or bool(llm.errored))
        try:
            await (self._adapter_calls.run(call) if for_adapter else call)
        except EngineLost as error:
            self._mark_dead(llm)
            raise EngineLost(f"engine {self.name} died") from error.__cause__
        finally:
            if observer is not None:
                await self._abort_unfinished(observer, llm)

    async def _on_adapters_changed(self) -> None:
        self._watchdog.on_progress()
        await self._read_models()

    async def _abort_unfinished(self, observer: TokenObserver, llm: Any) -> None:
        """Abort the sequences that a request left in the engine, for example because the client disconnected."""
        unfinished = [sequence for sequence, owner in self._sequences.items() if owner is observer]
        for sequence in unfinished:
            del self._sequences[sequence]
        if unfinished and llm is self._llm and not llm.errored:
            with contextlib.suppress(Exception):
                await llm.abort(unfinished, internal=True)

    def _on_gate_report(self, gate: GateReport, steps: list[StepReport]) -> None:
        self.state.gate = gate
        self.state.kv_tokens = gate.kv_tokens or self.state.kv_tokens
        self._watchdog.on_progress(len(steps))
        for step in steps:
            self.state.observe_step(step)
        if steps:
            self.state.last_step_at = time.monotonic()
            self._events.on_step()

    def _on_scheduler_stats(self, stats: Any) -> None:
        """vLLM's per-step scheduler statistics (`vllm.v1.metrics.stats.SchedulerStats`)."""
        self._watchdog.on_progress()
        self.state.engine_running = stats.num_running_reqs
        self.state.engine_waiting = stats.num_waiting_reqs
        self.state.kv_usage = stats.kv_cache_usage
