"""One real engine with a new gateway per run, for measurements on a real vLLM.

The engine stays up for the whole measurement, so that all policies run on the same engine. The gateway of a run has its
own policy, queue and statistics, and listens on a real socket.
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
from gateway.prediction.lengths import LengthStatistics

DUMMY = "small"
"""Model name of `dummy_engine`."""

_UNBOUNDED = 1e9
"""Expected output length (tokens) above every `max_tokens`, so that the cut at `max_tokens` decides."""


def dummy_engine(folder: Path, max_num_seqs: int = 256) -> Engine:
    """vLLM on CPU with a small random Llama, which two cores can drive into overload."""
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
    """``engine`` behind one gateway at a time. Step events go to the current gateway."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._gateway: Gateway | None = None

    async def start(self) -> None:
        """Start the engine. Raises `engine_adapter.engine.EngineStartError`."""
        await self.engine.start(EngineEvents(on_step=self._on_step))

    def _on_step(self) -> None:
        if self._gateway is not None:
            self._gateway.engine_queues[0].wake()

    @contextlib.asynccontextmanager
    async def gateway(
        self, policy: dict[str, Any], *, lengths_known: bool = False
    ) -> AsyncIterator[tuple[Gateway, str]]:
        """A new gateway with ``policy`` (its configuration) in front of the engine, and its URL.

        No predictor runs. A predicted length is the gateway's running median, cut at the request's ``max_tokens``. With
        ``lengths_known`` it is ``max_tokens`` itself, which is the true length under ``ignore_eos``.
        """
        config = parse(
            {
                # Required by the schema; the gateway gets the running engine below.
                "engines": [{"kind": "vllm", "model": DUMMY}],
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
