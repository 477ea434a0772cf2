"""What survives the crash of a gateway: API keys, and the corrections of its predictor."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine_adapter.engine import EngineEvents
from tests.fixtures.live_gateway import CHAT, CLASSES, chat, fast_engine
from tests.fixtures.live_server import HANG_S, serve
from tests.fixtures.ports import free_port
from tests.fixtures.served_process import served

KEY = {"authorization": "Bearer secret-key"}


async def predicted(port: int) -> dict[str, float]:
    """Return what the predictor at ``port`` predicts for a chat."""
    body = {"model": "simulated", "slo_class": "chat", "inputs": [{"prompt": "tell me a story"}]}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        found: dict[str, float] = (await http.post("/v1/predict", json=body)).json()["predictions"][0]
        return found


async def answers(port: int) -> bool:
    """Return whether a predictor listens at ``port``."""
    try:
        await predicted(port)
    except httpx.TransportError:
        return False
    return True


def saved_answers(folder: Path) -> int:
    """Return how many answers the state file in ``folder`` has."""
    file = folder / "calibration.json"
    windows = json.loads(file.read_text())["windows"] if file.exists() else []
    return sum(len(window["rows"]) for window in windows)


async def ask(http: httpx.AsyncClient, headers: dict[str, str]) -> int:
    return (await http.post(CHAT, json=chat(), headers=headers)).status_code


@pytest.mark.process
@pytest.mark.timeout(120)
async def test_keys_and_corrections_survive_a_crash(tmp_path: Path) -> None:
    engine, port, predictor = fast_engine(output_tokens=8), free_port(), free_port()
    await engine.start(EngineEvents())
    document: dict[str, Any] = {
        "server": {"port": 0},
        "engines": [{"kind": "http", "base_url": f"http://127.0.0.1:{port}"}],
        "predictor": {"port": predictor, "state_dir": str(tmp_path / "state"), "timeout_ms": 10_000},
        "keys_file": "keys.json",
        "classes": CLASSES,
        "default_class": "chat",
    }
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": []}')
    async with serve(engine.app, port):
        async with served(tmp_path, yaml.safe_dump(document)) as (process, http):
            digest = hashlib.sha256(KEY["authorization"].removeprefix("Bearer ").encode()).hexdigest()
            keys.write_text(json.dumps({"keys": [{"sha256": digest, "tenant": "a"}]}))
            async with asyncio.timeout(HANG_S):
                while await ask(http, KEY) == 401:
                    await asyncio.sleep(0.2)
            # A request with an end-to-end bound waits for its prediction. One without a prediction teaches nothing.
            taught = {**KEY, "x-slo-e2e-ms": "60000"}
            async with asyncio.timeout(HANG_S):
                while (await predicted(predictor))["p50"] > 16 or saved_answers(tmp_path / "state") < 20:
                    assert set(await asyncio.gather(*(ask(http, taught) for _ in range(20)))) == {200}
            before = await predicted(predictor)
            process.kill()
        # The predictor notes that its gateway is gone, and leaves its port to the next one.
        async with asyncio.timeout(HANG_S):
            while await answers(predictor):
                await asyncio.sleep(0.1)
        async with served(tmp_path, yaml.safe_dump(document)) as (_, http):
            async with asyncio.timeout(HANG_S):
                while not await answers(predictor):
                    await asyncio.sleep(0.1)
            after = await predicted(predictor)
            assert after["raw_p50"] == before["raw_p50"] > 16
            assert after["p50"] == pytest.approx(before["p50"], abs=4)
            assert [await ask(http, headers) for headers in (KEY, {})] == [200, 401]
    await engine.stop()
