"""The gateway of the soak: its engine, classes and limits."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from benchmarks.faults.rig import LIMITS, Rig, rig, vllm_rig

Engine = Literal["simulated", "vllm"]
VLLM_MODEL, VLLM_CONTEXT = "smollm2-135m-instruct", 512
"""The real model, and its context in the soak: a mutated request may have no limit of output tokens."""

SLOTS, STEP_S = 16, 0.02
"""Batch and step time (s) of the simulated server: about 20 requests a second."""

CLASSES: dict[str, Any] = {
    "interactive": {"ttft_ms": 2000, "tpot_ms": 150},
    "chat": {"ttft_ms": 5000, "tpot_ms": 300},
    "batch": {"ttft_ms": 30_000, "on_unattainable": "best_effort"},
}
"""The classes, in equal parts."""

BATCH_WAITING: dict[Engine, int] = {"simulated": 100, "vllm": 6}
"""Longest queue of `batch`. At twice the saturation `batch` gets little more than its guaranteed share of the engine,
with vLLM one step of 20. So its requests wait long. An operator bounds the queue by the wait that clients accept."""

KEPT = 1000
"""Records of ended requests that the gateway keeps. By default 10,000, which takes minutes to fill."""


@contextlib.asynccontextmanager
async def gateway(engine: Engine, folder: Path) -> AsyncIterator[Rig]:
    """The gateway to soak."""
    predictor = {"timeout_ms": 50, "state_dir": str(folder / "state"), "expected_tokens": 40}
    sections: dict[str, Any] = {
        "predictor": predictor,
        "limits": LIMITS,
        "classes": {**CLASSES, "batch": {**CLASSES["batch"], "max_waiting": BATCH_WAITING[engine]}},
        "decisions": {"keep": KEPT},
    }
    times = {"b": 0.0, "d": STEP_S, "alpha": 1e-5}
    started = (
        vllm_rig(folder, VLLM_MODEL, VLLM_CONTEXT, **sections)
        if engine == "vllm"
        else rig("http", folder, slots=SLOTS, step_times=times, **sections)
    )
    async with started as running:
        yield running
