"""The predictor as a real process that is hung, killed and started again while requests come in."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from gateway.prediction import supervisor as supervisor_module
from gateway.prediction.client import Prediction
from gateway.prediction.supervisor import Supervisor
from tests.fixtures.live_gateway import Live, Load, eventually, live

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

TIME_BOX_S = 0.1
TOKENS = 8
"""What the simulated engine answers; the predictor has to learn it."""


class Asking(Load):
    """A request every ten milliseconds, until told to stop."""

    def __init__(self, antares: Live) -> None:
        self.antares, self.answers, self.waited = antares, list[httpx.Response](), list[float]()
        predict = antares.gateway.predictor.predict

        async def timed(*args: Any, **options: Any) -> Prediction:
            began = time.monotonic()
            made = await predict(*args, **options)
            self.waited.append(time.monotonic() - began)
            return made

        antares.gateway.predictor.predict = timed  # type: ignore[method-assign]

    async def ask(self) -> None:
        self.answers.append(await self.antares.ask())

    async def more(self, answers: int) -> None:
        """Wait for so many further answers."""
        least = len(self.answers) + answers
        await eventually(lambda: len(self.answers) >= least, within_s=20)


async def test_hanging_killing_and_restarting_it_under_load_fails_no_request_and_loses_no_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_BACKOFF_S", (0.05,))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "predictor_service.cli", "serve", "--port", str(port), "--log-level", "error"]
    supervisor = Supervisor("predictor", [*command, "--state", str(tmp_path), "--exit-with-parent"])
    await supervisor.start()
    section = {"timeout_ms": TIME_BOX_S * 1000, "expected_tokens": 300}
    try:
        async with live(predictor_url=f"http://127.0.0.1:{port}", predictor=section) as antares:
            predictor = antares.gateway.predictor

            async def predicted() -> Prediction:
                """What the service says, as soon as it says something."""
                async with asyncio.timeout(20):
                    while True:
                        made = await predictor.predict("tell me a story", 4, "chat", None, model="simulated")
                        if made.source == "service":
                            return made
                        await asyncio.sleep(0.05)

            def saved() -> int:
                file = tmp_path / "calibration.json"
                windows = orjson.loads(file.read_bytes())["windows"] if file.exists() else []
                return sum(len(window["rows"]) for window in windows)

            assert await predictor.warm_up(max_wait_s=20)
            untaught = await predicted()
            assert untaught.tokens > 5 * TOKENS
            async with Asking(antares) as load:
                await eventually(lambda: saved() >= 60, within_s=20)

                assert supervisor.pid is not None
                os.kill(supervisor.pid, signal.SIGSTOP)
                await load.more(40)
                await eventually(lambda: not predictor.up)
                os.kill(supervisor.pid, signal.SIGCONT)
                await eventually(lambda: predictor.up, within_s=20)
                await load.more(10)

                os.kill(supervisor.pid, signal.SIGKILL)
                await load.more(40)
                await eventually(lambda: supervisor.restarts == 1, within_s=20)
                taught = await predicted()
                await load.more(10)
        assert {answer.status_code for answer in load.answers} == {200}
        assert max(load.waited) < TIME_BOX_S + 0.5, "half a second for a busy machine; a hang lasts for ever"
        assert taught.raw == pytest.approx(untaught.raw)
        assert taught.tokens == pytest.approx(TOKENS, rel=0.5)
    finally:
        await supervisor.stop()
