"""A plain `vllm serve` with our scheduler class, and the light gateway in front of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.live.dummy_model import write_dummy_model
from tests.fixtures.served import START_TIMEOUT_S, VLLM_CLI, Served, free_port, serve

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PLACES = 8


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a `vllm serve`."""
    folder = tmp_path_factory.mktemp("plain")
    model = write_dummy_model(folder / "model")
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-c",
        VLLM_CLI,
        "serve",
        str(model),
        "--served-model-name",
        "small",
        "--dtype",
        "float32",
    ]
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--load-format", "dummy", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--scheduler-cls", "engine_adapter.vllm_scheduler.SloScheduler"]
    command += ["--max-num-seqs", str(PLACES)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    log = folder / "vllm.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    try:
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def served(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = {"kind": "http", "name": "plain", "base_url": vllm}
    classes = {"strict": {"ttft_ms": 60_000, "tpot_ms": 2000}, "loose": {"ttft_ms": 60_000, "tpot_ms": 4000}}
    # SCORPIO's gate shares steps out by TPOT bounds, which shows in what comes when.
    config = {"engines": [engine], "classes": classes, "default_class": "loose", "policy": {"name": "scorpio"}}
    running = serve(tmp_path_factory.mktemp("light"), config)
    yield running
    running.stop()


def body(tokens: int) -> dict[str, object]:
    return {"model": "small", "prompt": "one two three", "max_tokens": tokens, "ignore_eos": True}


async def test_gate_paces_requests_of_a_plain_vllm_server(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.base, timeout=120, trust_env=False) as http:

        async def tpot(slo_class: str) -> float:
            headers = {"x-slo-class": slo_class, "x-slo-report": "1"}
            answer = await http.post("/v1/completions", json=body(100), headers=headers)
            verdict = answer.json()["antares"]
            assert verdict["output_tokens"] == 100
            return float(verdict["tpot_ms"])

        await tpot("strict")
        # The strict outnumber and outlive nobody: as long as they run, the loose decode in every other step.
        strict, *loose = await asyncio.gather(tpot("strict"), tpot("loose"), tpot("loose"))
    for slower in loose:
        assert slower > 1.25 * strict


async def test_gateway_observes_first_token_of_non_streaming_request(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.base, timeout=120, trust_env=False) as http:
        answer = (await http.post("/v1/completions", json=body(30), headers={"x-slo-report": "1"})).json()
    verdict = answer["antares"]
    assert answer["usage"]["completion_tokens"] == verdict["output_tokens"] == 30
    assert 0 < verdict["ttft_ms"] < verdict["e2e_ms"]


def test_gateway_process_loads_neither_torch_nor_vllm(served: Served) -> None:
    maps = Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "vllm" not in maps


async def test_gates_do_not_change_generated_text(vllm: str) -> None:
    async with httpx.AsyncClient(base_url=vllm, timeout=120, trust_env=False) as http:
        said = []
        for gate in (None, "credit", "slack", "a gate of tomorrow"):
            xargs = {} if gate is None else {"vllm_xargs": {"antares_tpot_ms": 500, "antares_gate": gate}}
            answer = await http.post("/v1/completions", json={**body(20), "temperature": 0, **xargs})
            assert answer.status_code == 200
            said.append(answer.json()["choices"][0]["text"])
    assert len(set(said)) == 1


async def test_best_effort_preemption_loses_no_token(vllm: str) -> None:
    async with httpx.AsyncClient(base_url=vllm, timeout=300, trust_env=False) as http:

        async def metric(name: str) -> float:
            lines = (await http.get("/metrics")).text.splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))

        async def answer(tokens: int, **xargs: object) -> dict[str, Any]:
            named = {**body(tokens), "temperature": 0, "vllm_xargs": {"antares_gate": "slack", **xargs}}
            answered = await http.post("/v1/completions", json=named)
            assert answered.status_code == 200, answered.text
            return answered.json()

        undisturbed = await answer(600)
        before = await metric("num_preemptions_total")
        others = [asyncio.create_task(answer(600)) for _ in range(PLACES)]
        while await metric("num_requests_running") < PLACES:
            await asyncio.sleep(0.02)
        await asyncio.gather(*[answer(5, antares_tpot_ms=900) for _ in range(3)])
        assert not any(other.done() for other in others), "three had places before any of the eight had ended"
        answers = await asyncio.gather(*others)
        # vLLM tells of it with the next token of whom it befell.
        assert await metric("num_preemptions_total") - before == 3
        for other in answers:
            assert other["usage"]["completion_tokens"] == 600
            assert other["choices"][0]["text"] == undisturbed["choices"][0]["text"]
