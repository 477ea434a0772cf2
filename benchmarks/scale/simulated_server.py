"""An OpenAI server with a simulated engine, which starts at once: `python -m benchmarks.scale.simulated_server`."""

from __future__ import annotations

import argparse
import asyncio

import uvicorn

from engine_adapter.engine import EngineEvents
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes

STEP_S = 0.02
"""A step takes as long as one of a small model on a CPU at its fastest."""


async def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    engine = SimulatedEngine(times=StepTimes(b=0.0, d=STEP_S, alpha=1e-5), max_num_seqs=16)
    await engine.start(EngineEvents())
    options = {"host": given.host, "port": given.port, "lifespan": "off", "log_level": "warning"}
    await uvicorn.Server(uvicorn.Config(engine.app, **options)).serve()


if __name__ == "__main__":
    asyncio.run(main())
