"""vLLM in this process: AsyncLLM and vLLM's own OpenAI app, with our scheduler class inside its EngineCore.

The EngineCore runs in a child process. When it dies, every request it held ends with `EngineLost`, and the engine is
built again with back-off while the gateway goes on answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import threading
import time
from typing import Any

from engine_adapter.engine import (
    OBSERVER_KEY,
    ASGIApp,
    EngineEvents,
    EngineLost,
    EngineStartError,
    EngineState,
    EngineUnreachable,
    GateReport,
    Message,
    Receive,
    Scope,
    Send,
    StepReport,
    TokenObserver,
)
from engine_adapter.step_time.calibration import PROBE_S, calibrate, warm_up
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.vllm.gate_channel import GateListener
from engine_adapter.vllm.launch import command_line, create_llm, prepare_environment
from engine_adapter.vllm.token_observation import current_observer, observe_outputs

log = logging.getLogger("antares.engine.vllm")

_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
FIRST_ANSWERS_S = 180.0
"""How long a new engine may take over its first synthetic requests."""

_creating = threading.Lock()


class VllmEngine:
    """In-process vLLM. Implements `engine_adapter.engine.Engine`.

    ``flags`` are `vllm serve`'s own, without the dashes (``{"max-model-len": 2048, "enforce-eager": True}``);
    ``gate`` names the step gate; ``step_times`` seeds the step-time model; ``calibrate`` runs a few synthetic
    requests after each start so that the model has seen steps before traffic comes.
    """

    takes_xargs = True

    def __init__(
        self,
        name: str,
        model: str,
        flags: dict[str, Any] | None = None,
        *,
        served_model_name: str | None = None,
        gate: str = "credit",
        step_times: StepTimes | None = None,
        calibrate: bool = True,
    ) -> None:
        self.name = name
        self.state = EngineState(
            model=served_model_name or model, step_time=StepTimeModel(times=step_times or StepTimes())
        )
        self._model = model
        self._served_model_name = served_model_name
        self._flags = dict(flags or {})
        self._gate = gate
        self._calibrate = calibrate
        self._events = EngineEvents()
        self._listener: GateListener | None = None
        self._llm: Any = None
        self._inner: ASGIApp | None = None
        self._watch: asyncio.Task[None] | None = None
        self._sequences: dict[str, TokenObserver] = {}
        self._on_cpu = False
        self._others: set[Any] = set()

    @property
    def app(self) -> ASGIApp:
        """vLLM's OpenAI app, observed."""
        return self._serve

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self, events: EngineEvents) -> None:
        """Build the engine (tens of seconds); afterwards watch over it."""
        self._events = events
        self._listener = GateListener(self._on_gate_report)
        self._listener.open(asyncio.get_running_loop())
        try:
            await self._build()
        except BaseException:
            await self.stop()
            raise
        self._watch = asyncio.create_task(self._watch_over(), name=f"watch {self.name}")

    async def stop(self) -> None:
        """Shut the EngineCore down. Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._watch
            self._watch = None
        if self._llm is None:
            # It may be starting, in a thread that cannot be cancelled but that ends when its EngineCore does.
            for child in set(multiprocessing.active_children()) - self._others:
                child.terminate()
        await self._tear_down()

    async def _build(self) -> None:
        """Bring a new EngineCore up. Raises `EngineStartError`, whatever went wrong."""
        started = time.monotonic()
        try:
            # In a thread: importing vLLM and waiting for its EngineCore take tens of seconds, and the gateway must go
            # on answering meanwhile. AsyncLLM starts its output task on its first use, on the event loop.
            self._llm, args = await asyncio.to_thread(self._create_llm)
            async with asyncio.timeout(FIRST_ANSWERS_S):
                await self._wire(args)
            _set_heap_aside()
        except EngineStartError:
            raise
        except Exception as failed:
            # NOTE: an engine that dies now leaves calls into it without an answer; hence the time limit.
            raise EngineStartError(f"vLLM came up but failed ({type(failed).__name__}: {failed})") from failed
        self.state.alive = True
        self.state.ready_in_s = time.monotonic() - started
        log.info("engine %s ready in %.0f s", self.name, time.monotonic() - started)
        self._events.on_alive(True)

    async def _wire(self, args: Any) -> None:
        """vLLM's own OpenAI app around the new engine, observed, and the step-time model taught."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._llm.get_supported_tasks()
        inner = build_app(args, tasks, self._llm.model_config)
        await init_app_state(self._llm, inner.state, args, tasks)
        inner.state.server = _NoServer()
        self._inner = inner
        observe_outputs(self._llm.output_processor, self._sequences)
        self._read_limits()
        if self._calibrate:
            await warm_up(self._run_synthetic, self.state.step_time)
            await calibrate(self._run_synthetic, self.state.step_time, self.state.max_num_seqs)

    def _create_llm(self) -> tuple[Any, Any]:
        # One engine at a time: what an EngineCore must know it inherits from this process's environment.
        with _creating:
            self._others = set(multiprocessing.active_children())
            if self._listener is None:
                raise EngineStartError("the engine was stopped while it started")
            prepare_environment(self._listener.path, self._gate)
            arguments = command_line(self._model, self._served_model_name, self._flags)
            return create_llm(arguments, self._on_scheduler_stats, stopped=lambda: self._listener is None)

    async def _tear_down(self) -> None:
        self.state.alive = False
        llm, self._llm, self._inner = self._llm, None, None
        if llm is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            # Whoever still waits for tokens must hear that none will come, while somebody is left to say so.
            llm.output_processor.propagate_error(EngineDeadError())
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # or it reports the shutdown as an engine that failed
            await asyncio.sleep(0)
            await asyncio.to_thread(llm.shutdown)
            # vLLM shuts down once more from a destructor, which fails noisily when the interpreter is on its way out.
            llm.shutdown = _already_shut_down
        self._sequences.clear()
        self.state.engine_running = self.state.engine_waiting = 0
        self.state.kv_usage = 0.0

    async def _watch_over(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self._llm is None or not self._llm.errored:
                continue
            self._note_death(self._llm)
            await self._restart()

    def _note_death(self, llm: Any) -> None:
        """``llm`` was found dead. An old one may be found so again, by a request that it kept waiting."""
        if self.state.alive and llm is self._llm:
            log.error("engine %s died", self.name)
            self.state.alive = False
            self._events.on_alive(False)

    async def _restart(self) -> None:
        for attempt in range(10**9):
            await self._tear_down()
            wait = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
            log.info("engine %s restarts in %.0f s", self.name, wait)
            await asyncio.sleep(wait)
            self.state.restarts += 1
            try:
                await self._build()
                return
            except EngineStartError as error:
                log.error("engine %s did not come back: %s", self.name, error)

    def _read_limits(self) -> None:
        config = self._llm.vllm_config
        state = self.state
        state.max_num_seqs = config.scheduler_config.max_num_seqs
        state.max_num_batched_tokens = config.scheduler_config.max_num_batched_tokens
        state.max_model_len = config.model_config.max_model_len
        blocks = config.cache_config.num_gpu_blocks or 0
        state.kv_tokens = blocks * (config.cache_config.block_size or 0)
        self._on_cpu = config.device_config.device_type == "cpu"
        state.plans_ahead = bool(config.scheduler_config.async_scheduling)

    async def _run_synthetic(self, prompt_tokens: int, output_tokens: int, salt: int) -> None:
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": [10 + (salt * 37 + i * i) % 900 for i in range(prompt_tokens)]}
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        name = f"calibrate-{salt}-{time.monotonic_ns()}"
        async for _ in self._llm.generate(prompt, params, request_id=name):
            pass

    async def probe(self) -> None:
        """A second or so of synthetic requests, from which the step times are learnt anew."""
        if not self.state.alive or self._sequences:
            return
        with contextlib.suppress(Exception):  # if the engine dies of it, the watch finds out
            self.state.step_time.forget()
            await calibrate(self._run_synthetic, self.state.step_time, self.state.max_num_seqs, PROBE_S)

    # --- what the gateway reads -----------------------------------------------------------------------------------

    def count_tokens(self, text: str) -> int | None:
        """Tokens in ``text`` by the model's tokenizer."""
        if self._llm is None:
            return None
        tokenizer = self._llm.get_tokenizer()
        return len(tokenizer.encode(text, add_special_tokens=False))

    def unsupported_reason(self, body: dict[str, Any]) -> str | None:
        """On CPU, vLLM's EngineCore dies on a per-request seed: drop it where it has no effect, else refuse."""
        if not self._on_cpu or body.get("seed") is None:
            return None
        if body.get("temperature") == 0:
            del body["seed"]
            return None
        return (
            "seed: vLLM on CPU cannot honour a per-request seed while sampling. "
            "Remove `seed`, or send `temperature: 0` for repeatable answers."
        )

    # --- one request ------------------------------------------------------------------------------------------------

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner, llm = self._inner, self._llm
        if inner is None or llm is None or llm.errored:
            self._note_death(llm)
            raise EngineUnreachable(f"engine {self.name} is down")
        observer: TokenObserver | None = scope.get(OBSERVER_KEY)
        lost = False

        def dead() -> bool:
            return llm is not self._llm or bool(llm.errored)

        async def watched_send(message: Message) -> None:
            nonlocal lost
            # vLLM answers for a dead engine with a 500 or an error event of its own; ours says more, and the outcome
            # must be known. Once the engine is dead, nothing but such an answer can follow.
            if lost or (dead() and _tells_of_death(message)):
                lost = True
                return
            await send(message)

        token = current_observer.set(observer)
        try:
            await inner(scope, receive, watched_send)
        except Exception as error:
            if dead():
                self._note_death(llm)
                raise EngineLost(f"engine {self.name} died") from error
            raise
        finally:
            current_observer.reset(token)
            if observer is not None:
                await self._free(observer, llm)
        if lost:
            self._note_death(llm)
            raise EngineLost(f"engine {self.name} died")

    async def _free(self, observer: TokenObserver, llm: Any) -> None:
        """Abort what a finished or abandoned call left in the engine (nothing, when all went well)."""
        left = [sequence for sequence, owner in self._sequences.items() if owner is observer]
        for sequence in left:
            del self._sequences[sequence]
        if left and not llm.errored:
            with contextlib.suppress(Exception):
                await llm.abort(left, internal=True)

    def _on_gate_report(self, gate: GateReport, steps: list[StepReport]) -> None:
        self.state.gate = gate
        for step in steps:
            self.state.step_time.observe(step.decode_requests, step.prefill_tokens, step.mean_context, step.elapsed_s)
        if steps:
            self._events.on_step()

    def _on_scheduler_stats(self, stats: Any) -> None:
        """vLLM's per-step scheduler statistics (`vllm.v1.metrics.stats.SchedulerStats`)."""
        self.state.engine_running = stats.num_running_reqs
        self.state.engine_waiting = stats.num_waiting_reqs
        self.state.kv_usage = stats.kv_cache_usage


def _already_shut_down(timeout: float | None = None) -> None:
    """Stands in for `AsyncLLM.shutdown` once it has run."""


def _set_heap_aside() -> None:
    """Keep the garbage collector away from what vLLM's import and start brought, nearly all of which stays.

    A full collection that walks through it stops the event loop, and with it every stream, for most of a second. Once,
    it has to: what an engine that died left is let go.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class _NoServer:
    """Stands where vLLM expects its uvicorn server, which it asks to exit when the engine dies. Ours stays up."""

    should_exit = False


def _tells_of_death(message: Message) -> bool:
    if message["type"] == "http.response.start":
        return bool(message["status"] >= 500)
    return b'"error"' in message.get("body", b"")
