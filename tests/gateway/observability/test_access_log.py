"""The access log of live requests, its rotation, and what happens when it cannot be written."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.api.auth import hash_key
from gateway.observability.access_log import AccessLog
from gateway.observability.background import BackgroundQueue
from gateway.observability.recorder import ObservabilityError, UnscheduledRecord
from tests.fixtures.live_gateway import CHAT, Live, chat, live
from tests.fixtures.live_server import eventually

KEY = "alice-key-0123456789abcdef"
CANARY = "xylophone-canary-7261"


def logging_to(path: Path) -> dict[str, Any]:
    return {"logging": {"access": "json", "access_path": str(path)}}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def unscheduled(client_id: str = "r") -> UnscheduledRecord:
    return UnscheduledRecord(client_id, "", "/v1/*", 404, 1.0, 0.001, "")


async def close(antares: Live) -> None:
    await asyncio.to_thread(antares.gateway.recorder.close)


async def test_line_of_a_finished_request_has_its_latencies(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    async with live(**logging_to(log)) as antares:
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        await antares.ask(chat(stream=True, max_tokens=4), x_request_id="mine", traceparent=trace)
        await close(antares)

    (line,) = lines_of(log)
    assert (line["request_id"], line["outcome"], line["status"], line["reason"]) == ("mine", "finished", 200, None)
    assert (line["tenant"], line["slo_class"], line["model"], line["engine"]) == (
        "anonymous", "chat", "simulated", "simulated",
    )  # fmt: skip
    assert (line["route"], line["stream"], line["output_tokens"], line["attempts"]) == (CHAT, True, 4, 1)
    assert (line["slo_ttft_ms"], line["slo_tpot_ms"], line["slo_e2e_ms"]) == (5000, 1000, None)
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["e2e_ms"] <= line["duration_ms"]
    assert line["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert line["time"].startswith("20")


async def test_every_request_has_one_line_without_text_and_keys(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    async with live(keys=[{"sha256": hash_key(KEY), "tenant": "alice"}], **logging_to(log)) as antares:
        key = {"authorization": f"Bearer {KEY}"}
        http = antares.http
        await http.post(CHAT, json=chat(CANARY), headers=key)
        await http.post(CHAT, json=chat(CANARY), headers={**key, "x-slo-ttft-ms": "0.001"})
        await http.post(CHAT, json=chat(CANARY), headers={"x-api-key": "wrong-" + KEY})
        await http.post(CHAT, content=b'{"messages": "' + CANARY.encode(), headers=key)
        await http.post(f"/v1/{CANARY}", json=chat(CANARY), headers=key)
        await http.post("/v1/embeddings", json={"model": CANARY, "input": CANARY}, headers=key)
        await http.get("/v1/models", headers=key)
        await http.get("/health")
        await eventually(antares.is_idle)
        await close(antares)

    lines = lines_of(log)
    assert [(line["status"], line["tenant"]) for line in lines[:5]] == [
        (200, "alice"), (429, "alice"), (401, None), (400, "alice"), (404, None),
    ]  # fmt: skip
    assert len(lines) == 7
    assert "outcome" not in lines[2]
    assert "xylophone" not in log.read_text()
    assert KEY not in log.read_text()


async def test_log_is_written_to_stderr_without_a_path(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    async with live(logging={"access": "json"}) as antares:
        await antares.ask(x_request_id="mine")
        await close(antares)

    written = [line for line in capfdbinary.readouterr().err.splitlines() if line.startswith(b"{")]
    assert [json.loads(line)["request_id"] for line in written] == ["mine"]


async def test_no_log_is_written_by_default(antares: Live) -> None:
    await antares.ask()
    assert antares.gateway.recorder.sinks == ()
    assert antares.gateway.recorder.unscheduled is None


async def test_rotated_file_is_opened_again(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    async with live(**logging_to(log)) as antares:
        await antares.ask(x_request_id="before")
        await eventually(log.read_text)
        log.rename(tmp_path / "access.jsonl.1")
        await antares.ask(x_request_id="after")
        await eventually(lambda: log.exists() and log.read_text())
        log.unlink()
        await antares.ask(x_request_id="later")
        await close(antares)

    assert [line["request_id"] for line in lines_of(tmp_path / "access.jsonl.1")] == ["before"]
    assert [line["request_id"] for line in lines_of(log)] == ["later"]


def test_full_disk_drops_lines_and_counts_them() -> None:
    log = AccessLog("/dev/full")
    for _ in range(3):
        log.put_unscheduled(unscheduled())
    log.close()
    assert log.dropped == 3


def test_folder_that_does_not_exist_is_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(ObservabilityError, match=r"logging.access_path: cannot open .*absent"):
        AccessLog(str(tmp_path / "absent" / "access.jsonl"))


def test_queue_that_blocks_drops_what_is_above_its_limit_without_waiting() -> None:
    release, handled = threading.Event(), []

    def handle(batch: list[int]) -> None:
        release.wait(10)
        handled.extend(batch)

    queue: BackgroundQueue[int] = BackgroundQueue("test", handle, limit=10, max_batch=4, delay_s=0)
    began = time.monotonic()
    for number in range(100):
        queue.put(number)
    assert time.monotonic() - began < 1
    release.set()
    queue.close(5)
    queue.put(1000)

    assert queue.dropped + len(handled) == 101
    assert 10 <= len(handled) <= 14
    assert handled == sorted(handled)


def test_queue_survives_a_handler_that_raises() -> None:
    handled: list[int] = []

    def handle(batch: list[int]) -> None:
        if 1 in batch:
            raise ValueError
        handled.extend(batch)

    queue: BackgroundQueue[int] = BackgroundQueue("test", handle, max_batch=1, delay_s=0)
    for number in range(3):
        queue.put(number)
    queue.close(5)
    assert (handled, queue.dropped) == ([0, 2], 1)
