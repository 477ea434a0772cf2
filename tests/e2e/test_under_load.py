"""A real vLLM with a small random model, driven hard: the step gate's shares, clients that leave, engines that die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from benchmarks.live.dummy_model import write_dummy_model
from tests.fixtures.served import Served, serve, still_running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

T = TypeVar("T")
LOOSE, STRICT = {"x-slo-class": "loose"}, {"x-slo-class": "strict"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("load")
    flags = {
        "load-format": "dummy",
        "max-model-len": 1024,
        "max-num-seqs": 128,
        "max-num-batched-tokens": 512,
        "enforce-eager": True,
        "dtype": "float32",
        "enable-prefix-caching": False,
    }
    engine = {
        "kind": "vllm",
        "name": "small",
        # Slow enough, at tens of milliseconds a step, that the engine is what everything here waits for. With steps
        # of a few milliseconds the gateway falls behind on a busy machine, and tells of moments long past.
        "model": str(write_dummy_model(folder / "model", "medium")),
        "served_model_name": "small",
        "flags": flags,
        "env": {"VLLM_CPU_KVCACHE_SPACE": 1, "HF_HUB_OFFLINE": 1, "VLLM_LOGGING_LEVEL": "ERROR"},
    }
    classes = {
        # 2:1 is what the gate sees.
        "strict": {"ttft_ms": 60_000, "tpot_ms": 2000},
        "loose": {"ttft_ms": 60_000, "tpot_ms": 4000},
    }
    # Whatever this machine's speed, everything here is admitted: these tests are about what happens after that.
    policy = {"name": "scorpio", "options": {"eta": 0, "ttft_guard": False}}
    running = serve(folder, {"engines": [engine], "classes": classes, "default_class": "loose", "policy": policy})
    yield running
    running.stop()


def connect(served: Served) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=200)
    return httpx.AsyncClient(base_url=served.base, timeout=120, limits=limits, trust_env=False)


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(served) as client:
        yield client


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": "one two three four", "max_tokens": tokens, "ignore_eos": True, **more}


async def read_stream(
    http: httpx.AsyncClient, tokens: int, leave_after: int | None = None, **headers: str
) -> list[str]:
    lines: list[str] = []
    request = http.stream("POST", "/v1/completions", json=body(tokens, stream=True), headers={**LOOSE, **headers})
    async with request as response:
        async for line in response.aiter_lines():
            if line:
                lines.append(line)
            if leave_after is not None and len(lines) >= leave_after:
                break
    return lines


def ended_in_full(lines: list[str]) -> bool:
    """Not every token is an event: half a character makes none."""
    return lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]


POLL_S = 0.3
"""What one look at the server may count for, however long it took: a machine that stands still is not waited for."""


async def eventually(condition: Callable[[], T | None], within_s: float, holds: Callable[[T], object] = bool) -> T:
    """Look until what ``condition`` returns ``holds``, and return that; fails after ``within_s``, with all it saw."""
    waited, seen = 0.0, []
    while True:
        looked = time.monotonic()
        value = await asyncio.to_thread(condition)
        if value is not None and holds(value):
            return value
        seen.append(f"{value} after {waited:.2f} s")
        assert waited < within_s, f"it never came to hold: {', '.join(seen[-40:])}"
        await asyncio.sleep(0.05)
        waited += min(time.monotonic() - looked, POLL_S)


@asynccontextmanager
async def ended_with(served: Served, streams: Sequence[asyncio.Task[Any]]) -> AsyncIterator[None]:
    """However the block ends, nothing of it is left for the next test to find."""
    try:
        yield
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await eventually(lambda: served.metric("antares_ledger_open"), 30, lambda requests: requests == 0)
        await eventually(lambda: served.metric("antares_engine_running_sequences"), 30, lambda running: running == 0)


async def test_requests_with_twice_the_tpot_bound_decode_in_half_the_steps(
    served: Served, http: httpx.AsyncClient
) -> None:
    def counted() -> dict[str, float]:
        text = served.get("/metrics").text  # one scrape: what is compared must be of one moment
        counts = {
            f"{what} {bound}": served.metric(f"antares_gate_{what}_total", text, tpot_ms=bound)
            for what in ("eligible", "batched")
            for bound in ("2000", "4000")
        }
        return {**counts, "running": served.metric("antares_engine_running_sequences", text)}

    async def counted_beside_each_other() -> dict[str, float] | None:
        """What the gate counted from a moment at which all decode; None if that moment was slept through.

        The loose, at half the pace, are the last to end, and once the strict have ended nobody is held back: it does
        not matter how late their end is noticed.
        """
        idle = counted()
        # As long as the model allows: a fast machine must not be done before it was looked at.
        streams = [asyncio.create_task(read_stream(http, 900, **bound)) for bound in [STRICT] * 6 + [LOOSE] * 6]

        def since(then: dict[str, float], least: float, **more: float) -> dict[str, float] | None:
            """What was counted since ``then``, once that is enough, or as soon as anybody's stream has ended."""
            now = counted()
            spent = {key: now[key] - then[key] for key in now}
            enough = min(spent["eligible 2000"], spent["eligible 4000"]) > least and more.items() <= now.items()
            return spent if enough or any(stream.done() for stream in streams) else None

        async with ended_with(served, streams):
            begun = await eventually(lambda: since(idle, 60, running=12), within_s=180)
            all_had_just_begun = max(begun["batched 2000"], begun["batched 4000"]) < 6 * 300
            before = counted()
            spent = await eventually(lambda: since(before, 1200), within_s=180)
        return spent if all_had_just_begun and spent["eligible 2000"] > 600 else None

    for _ in range(4):
        if spent := await counted_beside_each_other():
            break
    else:
        pytest.fail("four times all streams were whole before anybody came to look: what starves this process?")
    assert (spent["eligible 4000"] - spent["batched 4000"]) / spent["eligible 2000"] == pytest.approx(0.5, abs=0.05)
    assert spent["batched 2000"] / spent["eligible 2000"] == 1.0


async def test_client_disconnects_free_the_engine_within_two_seconds(served: Served) -> None:
    def in_engine() -> float:
        text = served.get("/metrics").text
        return sum(served.metric(f"antares_engine_{where}_sequences", text) for where in ("running", "waiting"))

    def left_open() -> float:
        return served.metric("antares_ledger_open")

    def open_files() -> int:
        return len(list(Path(f"/proc/{served.process.pid}/fd").iterdir()))

    def resident_kb() -> int:
        status = Path(f"/proc/{served.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def cancelled() -> int:
        return int(served.get("/status").json()["ledger"]["cancelled"])

    files: list[int] = []
    memory: list[int] = []
    before, slept = cancelled(), 0
    while len(files) < 10:
        async with connect(served) as http:
            already, started = cancelled(), time.monotonic()
            staying = [asyncio.create_task(read_stream(http, 48)) for _ in range(32)]
            # They ask for as much as there is: the engine, ahead of a busy machine, must not be done before they leave.
            leaving = [asyncio.create_task(read_stream(http, 900, leave_after=4)) for _ in range(32)]
            await asyncio.gather(*leaving)
            took_s = time.monotonic() - started
            await eventually(in_engine, 2, lambda sequences: sequences <= 32)
            assert left_open() <= 32
            assert all(ended_in_full(lines) for lines in await asyncio.gather(*staying))
        await eventually(left_open, 2, lambda requests: requests == 0)
        await eventually(in_engine, 2, lambda sequences: sequences == 0)
        if cancelled() == already and took_s > 30 and slept < 3:
            # Some kernels let a process wait for a core for as long as the engine's threads spin on it: minutes. Then
            # the answers were whole before these clients, or the gateway, came to anything, and nobody hung up.
            slept += 1
            continue
        assert cancelled() == already + 32, f"left after {took_s:.1f} s"
        files.append(open_files())
        memory.append(resident_kb())
    ledger = served.get("/status").json()["ledger"]
    assert ledger["cancelled"] == before + 320, ledger
    assert ledger["accepted"] == sum(ledger[outcome] for outcome in ("finished", "rejected", "failed", "cancelled"))
    # The first rounds fill the connection pool to the predictor, which is bounded.
    assert files[-1] <= files[1] + 16, f"open files, by round: {files}"
    assert memory[-1] - memory[1] < 50_000, f"resident memory in kB, by round: {memory}"


async def test_disconnect_before_non_streaming_response_frees_the_engine(
    served: Served, http: httpx.AsyncClient
) -> None:
    def cancelled() -> int:
        return int(served.get("/status").json()["ledger"]["cancelled"])

    for _ in range(4):
        before, started = cancelled(), time.monotonic()
        with contextlib.suppress(httpx.TimeoutException):
            await http.post("/v1/completions", json=body(900), headers=LOOSE, timeout=0.6)
        await eventually(lambda: served.metric("antares_engine_running_sequences"), 2, lambda running: running == 0)
        await eventually(lambda: served.metric("antares_ledger_open"), 2, lambda requests: requests == 0)
        if cancelled() == before + 1:
            return
        # Told above: the answer may be whole before the gateway, or this process, came to anything.
        assert time.monotonic() - started > 5, "it was not cancelled"
    pytest.fail("four times the answer was whole before the client had left: what starves this process?")


async def test_seed_that_kills_vllm_on_cpu_does_not_reach_it(served: Served, http: httpx.AsyncClient) -> None:
    refused = await http.post("/v1/completions", json=body(4, seed=1, temperature=0.7), headers=LOOSE)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")
    greedy = await http.post("/v1/completions", json=body(4, seed=1, temperature=0), headers=LOOSE)
    assert greedy.status_code == 200
    assert served.metric("antares_engine_restarts_total") == 0


async def test_killed_engine_fails_requests_in_flight_and_restarts(served: Served, http: httpx.AsyncClient) -> None:
    streams = [asyncio.create_task(read_stream(http, 900)) for _ in range(4)]
    whole = asyncio.create_task(http.post("/v1/completions", json=body(900), headers=LOOSE))
    await eventually(lambda: served.metric("antares_engine_running_sequences"), 30, lambda running: running == 5)
    os.kill(served.child("EngineCore"), signal.SIGKILL)
    for lines in await asyncio.gather(*streams):
        assert '"code":"engine_lost"' in lines[-2]
        assert lines[-1] == "data: [DONE]"
    assert (await whole).status_code == 503
    assert int((await whole).headers["retry-after"]) >= 1

    patient = asyncio.create_task(
        http.post("/v1/completions", json=body(4), headers={"x-slo-ttft-ms": "300000"}, timeout=300)
    )
    hurried = await http.post("/v1/completions", json=body(4), headers={"x-slo-ttft-ms": "2000"})
    assert (hurried.status_code, hurried.json()["error"]["code"]) == (503, "engine_unavailable")
    assert int(hurried.headers["retry-after"]) >= 1
    slowest, asked = 0.0, 0
    while not patient.done():
        started = time.monotonic()
        assert (await http.get("/health")).text == "ok"
        slowest, asked = max(slowest, time.monotonic() - started), asked + 1
        await asyncio.sleep(0.05)
    assert asked > 20
    assert slowest < 5
    assert (await patient).status_code == 200
    assert served.metric("antares_engine_restarts_total") == 1
    assert served.metric("antares_ledger_open") == 0
    assert served.get("/ready").status_code == 200


def test_killed_gateway_leaves_no_process(served: Served) -> None:
    """The last of the module: it kills the server."""
    children = list(served.children())
    assert len(children) >= 2
    served.process.kill()
    served.process.wait(10)
    assert still_running(children) == []
