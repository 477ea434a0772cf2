"""Requests under load while the predictor process hangs, is killed and restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from gateway.prediction.client import Question
from gateway.prediction.lengths import Prediction
from gateway.supervisor import Supervisor
from tests.fixtures.live_gateway import Live, Load, live
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.ports import free_port

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

TIMEOUT_S = 0.1
TOKENS = 8
"""Output tokens of the simulated engine, which the predictor must learn."""


class RequestLoad(Load):
    """A request every ten milliseconds. Records the responses, and the duration of each prediction (s)."""

    def __init__(self, antares: Live) -> None:
        self.antares, self.responses, self.waits = antares, list[httpx.Response](), list[float]()
        predict = antares.gateway.predictor.predict

        async def timed(*args: Any, **options: Any) -> Prediction:
            started = time.monotonic()
            prediction = await predict(*args, **options)
            self.waits.append(time.monotonic() - started)
            return prediction

        antares.gateway.predictor.predict = timed  # type: ignore[method-assign]

    async def ask(self) -> None:
        # With an end-to-end bound a request waits for its prediction.
        self.responses.append(await self.antares.ask(x_slo_e2e_ms="60000"))

    async def wait_for(self, count: int) -> None:
        """Wait for ``count`` further responses."""
        target = len(self.responses) + count
        await eventually(lambda: len(self.responses) >= target)


async def test_predictor_hang_and_crash_fail_no_request_and_lose_no_correction(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "predictor_service.cli", "serve", "--port", str(port), "--log-level", "error"]
    command += ["--state", str(tmp_path), "--exit-with-parent"]
    supervisor = Supervisor("predictor", command, backoff_s=(0.05,))
    await supervisor.start()
    section = {"timeout_ms": TIMEOUT_S * 1000, "expected_tokens": 300}
    try:
        async with live(predictor_url=f"http://127.0.0.1:{port}", predictor=section) as antares:
            predictor = antares.gateway.predictor

            async def predicted() -> Prediction:
                """Return the next prediction that comes from the service."""
                async with asyncio.timeout(HANG_S):
                    while True:
                        prediction = await predictor.predict(
                            Question("tell me a story", 4, "chat", None, model="simulated")
                        )
                        if prediction.source == "service":
                            return prediction
                        await asyncio.sleep(0.05)

            def saved_corrections() -> int:
                file = tmp_path / "calibration.json"
                windows = orjson.loads(file.read_bytes())["windows"] if file.exists() else []
                return sum(len(window["rows"]) for window in windows)

            assert await predictor.warm_up(max_wait_s=HANG_S)
            uncorrected = await predicted()
            assert uncorrected.tokens > 5 * TOKENS
            async with RequestLoad(antares) as load:
                await eventually(lambda: saved_corrections() >= 60)

                assert supervisor.pid is not None
                os.kill(supervisor.pid, signal.SIGSTOP)
                await load.wait_for(40)
                await eventually(lambda: not predictor.up)
                os.kill(supervisor.pid, signal.SIGCONT)
                await eventually(lambda: predictor.up)
                await load.wait_for(10)

                os.kill(supervisor.pid, signal.SIGKILL)
                await load.wait_for(40)
                await eventually(lambda: supervisor.restarts == 1)
                corrected = await predicted()
                await load.wait_for(10)
        assert {response.status_code for response in load.responses} == {200}
        assert max(load.waits) < TIMEOUT_S + 5  # a busy machine delays; a hang would not end
        assert corrected.raw == pytest.approx(uncorrected.raw)
        assert corrected.tokens == pytest.approx(TOKENS, rel=0.5)
    finally:
        await supervisor.stop()
