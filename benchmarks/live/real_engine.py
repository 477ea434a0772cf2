"""One real engine, and gateways that take turns in front of it: what measurements on a real vLLM share.

The engine stays up over the whole measurement, so that policies meet the same engine; each run has a gateway of its
own, with its own policy, books and statistics, on a real socket.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.live.dummy_model import write_dummy_model
from engine_adapter.build import BUILDERS
from engine_adapter.engine import Engine, EngineEvents
from gateway.app import Gateway
from gateway.config.schema import parse
from gateway.prediction.client import LengthStatistics

DUMMY = "small"
"""What `dummy_engine` calls its model."""

_UNBOUNDED = 1e9


def dummy_engine(folder: Path, max_num_seqs: int = 256) -> Engine:
    """vLLM on CPU with a small random Llama: fast enough on two cores to be driven into overload."""
    flags = {
        "load-format": "dummy",
        "max-model-len": 2048,
        "max-num-seqs": max_num_seqs,
        "max-num-batched-tokens": 512,
        "enforce-eager": True,
        "enable-prefix-caching": False,
    }
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    model = str(write_dummy_model(folder))
    return BUILDERS["vllm"](name=DUMMY, model=model, served_model_name=DUMMY, flags=flags, env=env)


class RealEngine:
    """``engine`` behind one gateway at a time; its step events go to whichever that is now."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._gateway: Gateway | None = None

    async def start(self) -> None:
        """Bring the engine up. Raises `engine_adapter.engine.EngineStartError`."""
        await self.engine.start(EngineEvents(on_step=self._on_step))

    def _on_step(self) -> None:
        if self._gateway is not None:
            self._gateway.engine_queues[0].wake()

    @contextlib.asynccontextmanager
    async def behind(
        self, policy: dict[str, Any], *, lengths_known: bool = False
    ) -> AsyncIterator[tuple[Gateway, str]]:
        """A new gateway with ``policy`` (its configuration) in front of the engine, and its URL.

        No predictor runs: lengths come from running statistics, cut at each request's ``max_tokens``. With
        ``lengths_known`` they are its ``max_tokens``, which with ``ignore_eos`` is an oracle.
        """
        config = parse(
            {
                "engines": [{"kind": "vllm", "model": DUMMY}],  # the engine was made before, not from here
                "predictor": {"enabled": False},
                "policy": policy,
                "classes": {"default": {"ttft_ms": 10_000, "tpot_ms": 1000, "max_waiting": 100_000}},
                "default_class": "default",
            }
        )
        statistics = LengthStatistics(expected=_UNBOUNDED, window=0) if lengths_known else None
        gateway = Gateway(config, [self.engine], statistics=statistics)
        server = uvicorn.Server(uvicorn.Config(gateway, port=0, lifespan="off", log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        self._gateway = gateway
        try:
            yield gateway, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            self._gateway = None
            server.should_exit = True
            await serving
