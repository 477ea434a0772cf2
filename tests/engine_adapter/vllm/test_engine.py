"""The in-process vLLM engine, with a stub in place of vLLM."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.engine import EngineEvents
from engine_adapter.vllm import engine as engine_module
from engine_adapter.vllm.engine import VllmEngine
from tests.fixtures.stub_modules import stub_modules


class StubLlm:
    """The parts of vLLM's AsyncLLM that `VllmEngine` uses. ``heap`` stands for its long-lived objects."""

    errored = False
    output_handler = None
    model_config = None

    def __init__(self) -> None:
        self.heap = [[number] for number in range(10_000)]
        self.output_processor = SimpleNamespace(
            add_request=None, process_outputs=None, propagate_error=lambda error: None
        )
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
