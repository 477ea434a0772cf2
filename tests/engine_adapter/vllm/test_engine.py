"""The in-process vLLM engine, with a stub in place of vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.engine import EngineEvents, EngineLost, Message
from engine_adapter.step_report import GateReport, StepReport
from engine_adapter.vllm import engine as engine_module
from engine_adapter.vllm import watchdog as watchdog_module
from engine_adapter.vllm.engine import VllmEngine
from engine_adapter.vllm.watchdog import FIRST_STEPS
from tests.fixtures.live_server import eventually
from tests.fixtures.stub_modules import stub_modules


class StubLlm:
    """The parts of vLLM's AsyncLLM that `VllmEngine` uses. ``heap`` stands for its long-lived objects."""

    errored = False
    output_handler = None
    model_config = None

    def __init__(self) -> None:
        self.heap = [[number] for number in range(10_000)]
        self.output_processor = SimpleNamespace(
            add_request=None, process_outputs=None, propagate_error=lambda error: None, request_states={}
        )
        self.processes: list[SimpleNamespace] = []
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=self))
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=512, async_scheduling=True),
            model_config=SimpleNamespace(max_model_len=1024),
            cache_config=SimpleNamespace(num_gpu_blocks=10, block_size=16, enable_prefix_caching=True),
            kv_events_config=None,
            device_config=SimpleNamespace(device_type="cpu"),
        )

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def shutdown(self) -> None: ...


class StubModels:
    """The part of vLLM's `OpenAIServingModels` that `VllmEngine` uses."""

    async def show_available_models(self) -> SimpleNamespace:
        return SimpleNamespace(model_dump=lambda: {"data": [{"id": "m", "max_model_len": 1024}]})


async def no_message() -> Message:
    """An ASGI client that sends nothing more."""
    await asyncio.sleep(60)
    raise AssertionError


async def ignore(message: Message) -> None:
    """An ASGI client that ignores what it gets."""


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> StubLlm:
    """Makes every `VllmEngine` start this stub, without vLLM and without changes to the environment."""

    async def init_app_state(*arguments: Any) -> None: ...

    renderer = SimpleNamespace(render_chat_async=None, render_cmpl_async=None)
    state = SimpleNamespace(online_renderer=SimpleNamespace(renderer=renderer), openai_serving_models=StubModels())
    stubs = {
        "vllm.entrypoints.launchers.api_server.app_state": {"init_app_state": init_app_state},
        "vllm.entrypoints.launchers.app": {"build_app": lambda *arguments: SimpleNamespace(state=state)},
        "vllm.v1.engine.exceptions": {"EngineDeadError": RuntimeError},
    }
    stub_modules(monkeypatch, stubs)
    stub = StubLlm()
    monkeypatch.setattr(engine_module, "prepare_environment", lambda socket, gate: None)
    monkeypatch.setattr(engine_module, "create_llm", lambda *arguments, **options: (stub, None))
    return stub


async def test_start_excludes_vllm_objects_from_garbage_collection(llm: StubLlm) -> None:
    engine = VllmEngine("engine", "model", calibrate=False)
    try:
        await engine.start(EngineEvents())
        assert gc.get_freeze_count() > len(llm.heap)
        assert not any(tracked is llm.heap for tracked in gc.get_objects())
    finally:
        await engine.stop()
        gc.unfreeze()


async def test_start_reads_the_engine_limits(llm: StubLlm) -> None:
    alive: list[bool] = []
    engine = VllmEngine("engine", "model", calibrate=False)
    try:
        await engine.start(EngineEvents(on_alive=alive.append))
        state = engine.state
        assert (state.max_num_seqs, state.max_num_batched_tokens, state.max_model_len) == (8, 512, 1024)
        assert (state.kv_tokens, state.plans_ahead) == (160, True)
    finally:
        await engine.stop()
        gc.unfreeze()
    assert alive == [True]
    assert not engine.state.alive


async def test_seed_on_cpu_is_rejected_unless_it_has_no_effect(llm: StubLlm) -> None:
    engine = VllmEngine("engine", "model", calibrate=False)
    try:
        await engine.start(EngineEvents())
        greedy = {"seed": 1, "temperature": 0}
        assert engine.unsupported_reason(greedy) is None
        assert greedy == {"temperature": 0}
        assert (engine.unsupported_reason({"seed": 1}) or "").startswith("seed: ")
    finally:
        await engine.stop()
        gc.unfreeze()


async def test_engine_without_steps_is_killed_and_restarted(llm: StubLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr(engine_module, "_BACKOFF_S", (0.0,))
    core = await asyncio.create_subprocess_exec("sleep", "60")
    alive: list[bool] = []
    engine = VllmEngine("engine", "model", calibrate=False, hang_timeout_s=1.2)
    try:
        await engine.start(EngineEvents(on_alive=alive.append))
        llm.processes = [SimpleNamespace(pid=core.pid)]
        engine._on_gate_report(GateReport(), [StepReport(1, 0, 10.0, 0.01)] * FIRST_STEPS)
        llm.output_processor.request_states["one"] = SimpleNamespace(prompt_len=5, is_prefilling=False)
        await eventually(lambda: len(alive) == 3)
        llm.output_processor.request_states.clear()
        assert engine.state.why_down == "it hung for 2 s and restarts"
        assert await asyncio.wait_for(core.wait(), 30) == -9
        assert (engine.state.hangs, engine.state.restarts) == (1, 1)
        assert alive == [True, False, True]
    finally:
        with contextlib.suppress(ProcessLookupError):
            core.kill()
        await engine.stop()
        gc.unfreeze()


async def test_hung_load_of_an_adapter_ends_with_a_restart(llm: StubLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client gets an error, although vLLM never ends a call into an EngineCore that died."""
    pytest.importorskip("psutil")
    monkeypatch.setattr(engine_module, "_BACKOFF_S", (0.0,))
    monkeypatch.setattr(watchdog_module, "WORKING_S", 2.2)
    monkeypatch.setattr(engine_module.openai_app, "call", lambda *arguments: asyncio.sleep(60))
    engine = VllmEngine("engine", "model", calibrate=False, hang_timeout_s=1)
    scope = {"type": "http", "path": "/v1/load_lora_adapter"}
    try:
        await engine.start(EngineEvents())
        with pytest.raises(EngineLost):
            await asyncio.wait_for(engine.app(scope, no_message, ignore), 30)
        await eventually(lambda: engine.state.alive)
        assert (engine.state.hangs, engine.state.restarts) == (1, 1)
    finally:
        await engine.stop()
        gc.unfreeze()


@pytest.mark.parametrize("ends_well", [True, False])
async def test_adapter_loads_on_after_its_client_left(
    llm: StubLlm, monkeypatch: pytest.MonkeyPatch, ends_well: bool
) -> None:
    """So another client's request, which waits for the load, does not make the watchdog see a hang."""
    pytest.importorskip("psutil")
    loaded, unhandled = asyncio.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))

    async def call(*arguments: Any) -> None:
        await loaded.wait()
        if not ends_well:
            raise OSError

    monkeypatch.setattr(engine_module.openai_app, "call", call)
    core = await asyncio.create_subprocess_exec("sleep", "60")
    engine = VllmEngine("engine", "model", calibrate=False, hang_timeout_s=1)
    try:
        await engine.start(EngineEvents())
        llm.processes = [SimpleNamespace(pid=core.pid)]
        engine._on_gate_report(GateReport(), [StepReport(1, 0, 10.0, 0.01)] * FIRST_STEPS)
        client = asyncio.ensure_future(
            engine.app({"type": "http", "path": "/v1/load_lora_adapter"}, no_message, ignore)
        )
        await asyncio.sleep(0.05)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        # The last step before the load may be reported only now.
        engine._on_gate_report(GateReport(), [StepReport(1, 0, 10.0, 0.01)])
        llm.output_processor.request_states["one"] = SimpleNamespace(prompt_len=5, is_prefilling=True)
        await eventually(lambda: engine._watchdog.silent_s > 3)
        assert (engine.state.alive, engine.state.hangs) == (True, 0)
        engine.state.models = {}
        loaded.set()
        await eventually(lambda: not engine._adapter_calls)
        assert (engine._watchdog.silent_s < 1) == ends_well
        assert bool(engine.state.models) == ends_well
        await eventually(lambda: engine.state.hangs == 1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            core.kill()
        await core.wait()
        await engine.stop()
        gc.unfreeze()
    gc.collect()
    assert not unhandled


async def test_engine_without_work_or_with_steps_is_not_restarted(llm: StubLlm) -> None:
    engine = VllmEngine("engine", "model", calibrate=False, hang_timeout_s=1)
    states = llm.output_processor.request_states
    try:
        await engine.start(EngineEvents())
        engine._on_gate_report(GateReport(), [StepReport(1, 0, 10.0, 0.01)] * FIRST_STEPS)
        await asyncio.sleep(1.3)
        states["one"] = SimpleNamespace(prompt_len=5, is_prefilling=True)
        for _ in range(26):
            await asyncio.sleep(0.05)
            engine._on_scheduler_stats(SimpleNamespace(num_running_reqs=1, num_waiting_reqs=0, kv_cache_usage=0.1))
        assert (engine.state.alive, engine.state.hangs) == (True, 0)
    finally:
        await engine.stop()
        gc.unfreeze()


async def test_load_of_an_adapter_that_ends_is_progress(llm: StubLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.openai_app, "call", lambda *arguments: asyncio.sleep(0))
    engine = VllmEngine("engine", "model", calibrate=False, hang_timeout_s=5)
    try:
        await engine.start(EngineEvents())
        engine._watchdog.add_silence(4.0)
        assert engine._watchdog.silent_s > 0
        await engine.app({"type": "http", "path": "/v1/load_lora_adapter"}, no_message, ignore)
        assert engine._watchdog.silent_s == 0
    finally:
        await engine.stop()
        gc.unfreeze()
