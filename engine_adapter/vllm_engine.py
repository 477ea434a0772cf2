"""vLLM in this process: AsyncLLM and vLLM's own OpenAI app, with our scheduler class inside its EngineCore.

The EngineCore runs in a child process. When it dies, every request it held ends with `EngineLost`, and the engine is
built again with back-off while the gateway goes on answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import signal
import time
from multiprocessing import resource_tracker
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
from engine_adapter.gate_channel import SOCKET_ENV, GateListener
from engine_adapter.step_time import StepTimeModel, StepTimes

log = logging.getLogger("antares.engine.vllm")

_observer: contextvars.ContextVar[TokenObserver | None] = contextvars.ContextVar("antares_observer", default=None)
"""The request being served. vLLM's app adds sequences to its engine in tasks that inherit this context."""

_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
CALIBRATION_S = 4.0
"""About how long calibration takes: half of it for prefill, half for decode; no round starts later."""

SCHEDULER = "engine_adapter.vllm_scheduler.SloScheduler"


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
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await self._tear_down()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _build(self) -> None:
        assert self._listener is not None
        os.environ[SOCKET_ENV] = self._listener.path
        os.environ["ANTARES_GATE"] = self._gate
        # vLLM logs to standard output unless told otherwise; ours is for what a command was asked to print.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        started = time.monotonic()
        # In a thread: importing vLLM and waiting for its EngineCore take tens of seconds, and the gateway must go on
        # answering meanwhile. AsyncLLM starts its output task on its first use, on the event loop.
        self._llm, args = await asyncio.to_thread(self._create_llm)
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._llm.get_supported_tasks()
        inner = build_app(args, tasks, self._llm.model_config)
        await init_app_state(self._llm, inner.state, args, tasks)
        inner.state.server = _NoServer()
        self._inner = inner
        self._observe_outputs()
        self._read_limits()
        if self._calibrate:
            await self._run_synthetic_requests()
        self.state.alive = True
        self.state.ready_in_s = time.monotonic() - started
        log.info("engine %s ready in %.0f s", self.name, time.monotonic() - started)
        self._events.on_alive(True)

    def _create_llm(self) -> tuple[Any, Any]:
        try:
            import vllm
        except ImportError as missing:
            raise EngineStartError(
                "engine.kind is 'vllm' but vLLM is not importable "
                f"({missing}). Run `make install` for vLLM on CPU or `pip install 'antares-gateway[gpu]'` for GPUs."
            ) from missing
        from engine_adapter.vllm_versions import IN_PROCESS_VERSIONS, UnsupportedVllmError, require

        try:
            require(vllm.__version__, IN_PROCESS_VERSIONS, "The in-process engine")
        except UnsupportedVllmError as unsupported:
            raise EngineStartError(str(unsupported)) from unsupported
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        # Ctrl-C goes to every process of the terminal's group, but only the gateway may act on it: it drains first and
        # then stops its engine. A process inherits the signal mask of the thread that starts it. (The resource tracker
        # comes first: multiprocessing unblocks SIGINT when it starts that one.)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            args = make_arg_parser(FlexibleArgumentParser()).parse_args(self._command_line())
            validate_parsed_serve_args(args)
            config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
            llm = AsyncLLM.from_vllm_config(config, stat_loggers=[_stat_logger(self)])
        except SystemExit as bad_flag:
            raise EngineStartError("vLLM refused engine.flags; the lines above say which flag and why") from bad_flag
        except Exception as failed:
            raise EngineStartError(f"vLLM could not start: {failed}") from failed
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return llm, args

    def _command_line(self) -> list[str]:
        flags: dict[str, Any] = {"scheduler-cls": SCHEDULER, **self._flags, "model": self._model}
        if self._served_model_name:
            flags["served-model-name"] = self._served_model_name
        line: list[str] = []
        for flag, value in flags.items():
            if value is True:
                line.append(f"--{flag}")
            elif value is False:
                line.append(f"--no-{flag}")
            elif isinstance(value, list):
                line += [f"--{flag}", *map(str, value)]
            elif value is not None:
                line += [f"--{flag}", str(value)]
        return line

    async def _tear_down(self) -> None:
        self.state.alive = False
        llm, self._llm, self._inner = self._llm, None, None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # first, or it reports the shutdown as an engine that failed
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
            self._note_death()
            await self._restart()

    def _note_death(self) -> None:
        if self.state.alive:
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

    async def _run_synthetic_requests(self) -> None:
        """A few seconds of known work, so that the step-time model knows this machine before traffic comes."""
        from vllm import SamplingParams

        async def run(prompt_tokens: int, output_tokens: int, salt: int) -> None:
            # Salted, so that no prompt is found in the prefix cache.
            prompt = {"prompt_token_ids": [10 + (salt * 37 + i * i) % 900 for i in range(prompt_tokens)]}
            params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, detokenize=False)
            async for _ in self._llm.generate(prompt, params, request_id=f"calibrate-{salt}"):
                pass

        model = self.state.step_time
        # The first requests pay for one-time costs (allocation, kernel selection): nothing to learn from them.
        model.learn = False
        await run(8, 4, 0)
        await run(64, 4, 1)
        model.learn = True
        until = time.monotonic() + CALIBRATION_S / 2
        for salt, tokens in enumerate((8, 16, 24, 32, 48, 64, 96, 128), start=2):
            await run(tokens, 1, salt)
            if time.monotonic() > until:
                break
        until = time.monotonic() + CALIBRATION_S / 2
        for batch in (1, 2, 4, 8):
            size = min(batch, self.state.max_num_seqs)
            await asyncio.gather(*(run(8 + 8 * i, 12, 100 * batch + i) for i in range(size)))
            if time.monotonic() > until:
                break
        # The gate's last report travels by another way than the tokens.
        await asyncio.sleep(0.05)
        model.refit()

    # --- what the gateway reads -----------------------------------------------------------------------------------

    def count_tokens(self, text: str) -> int | None:
        """Tokens in ``text`` by the model's tokenizer."""
        if self._llm is None:
            return None
        tokenizer = self._llm.get_tokenizer()
        return len(tokenizer.encode(text, add_special_tokens=False))

    def refuse(self, body: dict[str, Any]) -> str | None:
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
            self._note_death()
            raise EngineUnreachable(f"engine {self.name} is down")
        observer: TokenObserver | None = scope.get(OBSERVER_KEY)
        lost = False

        async def watched_send(message: Message) -> None:
            nonlocal lost
            # vLLM answers for a dead engine with a 500 or an error event of its own; ours says more, and the outcome
            # must be known. Once the engine is dead, nothing but such an answer can follow.
            if lost or (llm.errored and _tells_of_death(message)):
                lost = True
                return
            await send(message)

        token = _observer.set(observer)
        try:
            await inner(scope, receive, watched_send)
        except Exception as error:
            if llm.errored:
                self._note_death()
                raise EngineLost(f"engine {self.name} died") from error
            raise
        finally:
            _observer.reset(token)
            if observer is not None:
                await self._free(observer, llm)
        if lost:
            self._note_death()
            raise EngineLost(f"engine {self.name} died")

    async def _free(self, observer: TokenObserver, llm: Any) -> None:
        """Abort what a finished or abandoned call left in the engine (nothing, when all went well)."""
        left = [sequence for sequence, owner in self._sequences.items() if owner is observer]
        for sequence in left:
            del self._sequences[sequence]
        if left and not llm.errored:
            with contextlib.suppress(Exception):
                await llm.abort(left, internal=True)

    def _observe_outputs(self) -> None:
        """Hook the one place that sees every sequence enter and every step's tokens leave, streaming or not."""
        processor = self._llm.output_processor
        add_request, process_outputs = processor.add_request, processor.process_outputs
        sequences = self._sequences

        def observed_add_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            observer = _observer.get()
            if observer is not None:
                sequences[request.request_id] = observer
                observer.on_prompt(request.request_id, len(request.prompt_token_ids or ()))
            return add_request(request, *args, **kwargs)

        def observed_process_outputs(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            now = time.monotonic()
            for output in outputs:
                observer = sequences.get(output.request_id)
                if observer is None:
                    continue
                if output.new_token_ids:
                    observer.on_tokens(output.request_id, len(output.new_token_ids), now)
                if output.finish_reason is not None:
                    del sequences[output.request_id]
            return process_outputs(outputs, *args, **kwargs)

        processor.add_request = observed_add_request
        processor.process_outputs = observed_process_outputs

    def _on_gate_report(self, gate: GateReport, steps: list[StepReport]) -> None:
        self.state.gate = gate
        for step in steps:
            self.state.step_time.observe(step.decode_requests, step.prefill_tokens, step.mean_context, step.elapsed_s)
        if steps:
            self._events.on_step()

    def on_scheduler_stats(self, stats: Any) -> None:
        """vLLM's per-step scheduler statistics (`vllm.v1.metrics.stats.SchedulerStats`)."""
        self.state.engine_running = stats.num_running_reqs
        self.state.engine_waiting = stats.num_waiting_reqs
        self.state.kv_usage = stats.kv_cache_usage


def _already_shut_down(timeout: float | None = None) -> None:
    """Stands in for `AsyncLLM.shutdown` once it has run."""


class _NoServer:
    """Stands where vLLM expects its uvicorn server, which it asks to exit when the engine dies. Ours stays up."""

    should_exit = False


def _tells_of_death(message: Message) -> bool:
    if message["type"] == "http.response.start":
        return bool(message["status"] >= 500)
    return b'"error"' in message.get("body", b"")


def _stat_logger(engine: VllmEngine) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Forward(StatLoggerBase):  # type: ignore[misc]
        """Hands vLLM's statistics to the adapter."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                engine.on_scheduler_stats(scheduler_stats)

        def log_engine_initialized(self) -> None: ...

    return Forward
