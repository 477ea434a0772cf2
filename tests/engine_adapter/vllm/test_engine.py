"""vLLM in this process, as far as it can be looked at without a vLLM."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from engine_adapter.vllm.engine import VllmEngine


async def test_the_garbage_collector_leaves_alone_what_vllm_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    brought = [[number] for number in range(10_000)]

    async def wired(args: Any) -> None:
        pass

    engine = VllmEngine("engine", "model")
    monkeypatch.setattr(engine, "_create_llm", lambda: (brought, None))
    monkeypatch.setattr(engine, "_wire", wired)
    try:
        await engine._build()
        assert gc.get_freeze_count() > len(brought)
        assert not any(each is brought for each in gc.get_objects())
    finally:
        gc.unfreeze()
