"""The recording of traffic: what its lines hold, what they hide, its files, and what the simulator makes of it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.api.auth import hash_key
from gateway.observability import line_file
from gateway.observability.decisions import RequestRecord
from gateway.observability.ledger import Entry
from gateway.observability.recorder import ObservabilityError
from gateway.observability.traffic_recording import MAX_HASHES, TrafficRecording, previous_name
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from lab.cli import app
from lab.workload import make_workload
from tests.fixtures.live_gateway import TEXT, Live, chat, gateway_config, live
from tests.fixtures.live_server import eventually

KEY = "alice-key-0123456789abcdef"
CANARY = "xylophone-canary-7261"
LONG = " ".join(map(str, range(400)))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def close(antares: Live) -> None:
    await asyncio.to_thread(antares.gateway.recorder.close)


def ended(
    number: int = 0, *, outcome: Any = "finished", generated: int = 5, blocks: tuple[int, ...] = (), **changes: Any
) -> tuple[RequestRecord, Entry]:
    request = Request(f"r{number}", "chat", 0.0, Slo(ttft_s=1.0), 100, 10.0, blocks=blocks, **changes)
    request.generated = generated
    entry = Entry(request, outcome=outcome, prompt_source="estimated")
    return RequestRecord.of(entry, 200), entry


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "traffic.jsonl"


@pytest.fixture
def recording(path: Path) -> Iterator[TrafficRecording]:
    opened = TrafficRecording(str(path), 1_000_000)
    yield opened
    opened.close()


# --- lines ------------------------------------------------------------------------------------------------------------


async def test_line_has_what_the_simulator_needs(path: Path) -> None:
    async with live(recording={"path": str(path)}) as antares:
        await antares.ask(chat(LONG, max_tokens=4))
        await antares.ask({"prompt": list(range(200)), "n": 2, "max_tokens": 3}, TEXT, x_slo_class="free")
        await close(antares)

    first, second = lines_of(path)
    assert (first["slo_class"], first["slo_ttft_ms"], first["slo_tpot_ms"], first["slo_e2e_ms"]) == (
        "chat", 5000, 1000, None,
    )  # fmt: skip
    assert (first["outcome"], first["model"], first["output_length"], first["max_tokens"]) == (
        "finished", "simulated", 4, 4,
    )  # fmt: skip
    assert len(first["hash_ids"]) == int(first["input_length"] // first["block_tokens"]) > 0
    assert (second["input_length"], second["output_length"], second["sequences"]) == (200, 3, 2)
    assert (second["slo_class"], second["slo_ttft_ms"], second["block_tokens"]) == ("free", None, 64)
    assert 0 <= second["timestamp"] - first["timestamp"] < 60_000


async def test_requests_that_were_not_served_count_with_their_predicted_length(path: Path) -> None:
    async with live(recording={"path": str(path)}) as antares:
        await antares.ask(chat(LONG), x_slo_ttft_ms="0.001", x_slo_output_tokens="77")
        await antares.hang_up_after(8)
        await eventually(antares.is_idle)
        await close(antares)

    rejected, cancelled = lines_of(path)
    assert (rejected["outcome"], rejected["output_length"]) == ("rejected", 77)
    assert cancelled["outcome"] == "cancelled"
    assert 0 < cancelled["output_length"] < 4000


async def test_requests_that_no_engine_would_serve_are_left_out(path: Path) -> None:
    keys = [{"sha256": hash_key(KEY), "tenant": "alice", "tokens_per_minute": 1}]
    async with live(recording={"path": str(path)}, keys=keys) as antares:
        await antares.ask(authorization=f"Bearer {KEY}")
        await antares.ask(authorization="Bearer wrong")
        await antares.http.get("/v1/models", headers={"x-api-key": KEY})
        await close(antares)

    assert lines_of(path) == []


def test_unmeasured_requests_are_as_long_as_the_last_one_of_their_class(
    recording: TrafficRecording, path: Path
) -> None:
    def unmeasured(number: int) -> tuple[RequestRecord, Entry]:
        entry = Entry(Request(f"u{number}", "chat", 0.0, Slo(), 1, 1.0), outcome="rejected", reason="gateway_full")
        return RequestRecord.of(entry, 429), entry

    recording.put(*unmeasured(0))
    recording.put(*ended())
    recording.put(*unmeasured(1))
    recording.close()

    assert [(line["outcome"], line["input_length"], line["output_length"]) for line in lines_of(path)] == [
        ("finished", 100, 5), ("rejected", 100, 5),
    ]  # fmt: skip


# --- what they hide ---------------------------------------------------------------------------------------------------


async def test_recording_has_no_text_no_key_and_no_tenant(path: Path) -> None:
    keys = [{"sha256": hash_key(KEY), "tenant": "alice"}]
    async with live(recording={"path": str(path)}, keys=keys) as antares:
        await antares.ask(chat(CANARY * 50), authorization=f"Bearer {KEY}", x_request_id=CANARY)
        await close(antares)

    (line,) = lines_of(path)
    assert line["hash_ids"]
    assert not [secret for secret in ("xylophone", KEY, "alice") if secret in json.dumps(line)]


def test_equal_prefixes_have_equal_hashes_in_one_recording_only(tmp_path: Path) -> None:
    hashes = []
    for name in ("a.jsonl", "b.jsonl"):
        recording = TrafficRecording(str(tmp_path / name), 1_000_000)
        recording.put(*ended(0, blocks=(1, -2, 3), block_tokens=64.0, block_bytes=256))
        recording.put(*ended(1, blocks=(1, -2, 4), block_tokens=64.0, block_bytes=256))
        recording.close()
        hashes.append([line["hash_ids"] for line in lines_of(tmp_path / name)])

    (first, second), other = hashes
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert not set(first) & set(other[0])
    assert all(0 <= one < 2**53 for one in first)


def test_blocks_are_joined_and_bounded(recording: TrafficRecording, path: Path) -> None:
    recording.put(*ended(0, blocks=tuple(range(10)), block_tokens=16.0, block_bytes=64))
    recording.put(*ended(1, blocks=tuple(range(5 * MAX_HASHES)), block_tokens=16.0, block_bytes=64))
    recording.close()

    short, long = lines_of(path)
    assert (len(short["hash_ids"]), short["block_tokens"]) == (2, 64)
    assert len(long["hash_ids"]) == MAX_HASHES
    assert long["hash_ids"][:2] == short["hash_ids"]


def test_block_size_follows_the_count_of_the_engine(recording: TrafficRecording, path: Path) -> None:
    record, entry = ended(0, blocks=(1,), block_tokens=64.0, block_bytes=256)
    entry.estimated_prompt_tokens = 80
    recording.put(record, entry)
    recording.close()

    assert lines_of(path)[0]["block_tokens"] == 80.0


# --- files ------------------------------------------------------------------------------------------------------------


def test_full_file_is_renamed_and_the_next_one_has_other_hashes(tmp_path: Path) -> None:
    path, written = tmp_path / "traffic.jsonl", 0
    for number in range(30):
        # One file's size per recording, so that each batch is one line.
        recording = TrafficRecording(str(path), 1000)
        recording.put(*ended(number, blocks=(1, 2), block_tokens=64.0, block_bytes=256))
        recording.close()
        written += recording.dropped == 0

    assert written == 30
    files = [tmp_path / "traffic.jsonl", tmp_path / "traffic.1.jsonl"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(0 < file.stat().st_size <= 1000 for file in files)
    assert all(lines_of(file) for file in files)


def test_two_recordings_of_a_file_lose_no_line_when_it_is_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As of two processes, which find the file full at the same time.
    one, two = (line_file.LineFile(str(path), "recording.path") for _ in range(2))
    one.append(b"of both, and full\n")
    lock = line_file._lock

    def after_the_other(descriptor: int) -> None:
        monkeypatch.setattr(line_file, "_lock", lock)
        two.rotate(previous_name(str(path)), 10)
        two.append(b"new\n")
        lock(descriptor)

    monkeypatch.setattr(line_file, "_lock", after_the_other)
    one.rotate(previous_name(str(path)), 10)
    one.append(b"also\n")
    assert path.read_text() == "new\nalso\n"
    assert Path(previous_name(str(path))).read_text() == "of both, and full\n"
    one.close()
    two.close()


async def test_file_that_another_program_renamed_has_other_hashes(
    tmp_path: Path, path: Path, recording: TrafficRecording
) -> None:
    hashes = []
    for number in range(2):
        recording.put(*ended(number, blocks=(1, 2), block_tokens=64.0, block_bytes=256))
        await eventually(lambda: path.exists() and lines_of(path))
        hashes.append(lines_of(path)[0]["hash_ids"])
        os.rename(path, tmp_path / f"old-{number}")  # noqa: PTH104 - of a local file
    assert hashes[0] != hashes[1]


def test_full_disk_drops_requests_and_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = line_file.os.write

    def until_full(descriptor: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:-50])

    full, later = TrafficRecording(str(path), 1_000_000), TrafficRecording(str(path), 1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(line_file.os, "write", until_full)
        full.put(*ended(0))
        full.close()
    later.put(*ended(1))
    later.close()

    assert (full.dropped, later.dropped) == (1, 0)
    assert [line["outcome"] for line in lines_of(path)] == ["finished"]


async def test_disk_that_is_full_from_the_start_does_not_hurt_serving() -> None:
    async with live() as antares:
        antares.gateway.recorder.traffic = TrafficRecording("/dev/full", 1_000_000)
        assert (await antares.ask()).status_code == 200
        await eventually(lambda: antares.gateway.recorder.traffic.dropped == 1)
        assert (await antares.ask()).status_code == 200


def test_folder_that_does_not_exist_is_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(ObservabilityError, match=r"recording.path: cannot open .*absent"):
        TrafficRecording(str(tmp_path / "absent" / "traffic.jsonl"), 1)


def test_name_of_the_file_must_be_one_that_the_simulator_reads() -> None:
    with pytest.raises(ValueError, match="jsonl"):
        gateway_config(recording={"path": "traffic.log"})
    assert previous_name("/a/traffic.jsonl") == "/a/traffic.1.jsonl"


async def test_nothing_is_recorded_by_default(antares: Live) -> None:
    assert antares.gateway.recorder.traffic is None


# --- reload -----------------------------------------------------------------------------------------------------------


async def test_reload_begins_and_ends_a_recording(path: Path, tmp_path: Path) -> None:
    async with live() as antares:
        await antares.ask()
        done = antares.gateway.reload(gateway_config(recording={"path": str(path)}))
        assert (done.changed, done.needs_restart) == (["recording"], [])
        await antares.ask(chat(max_tokens=2))
        metrics = (await antares.http.get("/metrics")).text
        assert 'antares_records_dropped_total{sink="recording"} 0.0' in metrics
        antares.gateway.reload(gateway_config())
        await antares.ask()
        await eventually(path.read_text)

    assert [line["output_length"] for line in lines_of(path)] == [2]


async def test_reload_with_a_path_that_cannot_be_opened_changes_nothing(path: Path, tmp_path: Path) -> None:
    async with live(recording={"path": str(path)}) as antares:
        before = antares.gateway.recorder.traffic
        with pytest.raises(ObservabilityError, match=r"recording.path"):
            antares.gateway.reload(gateway_config(recording={"path": str(tmp_path / "absent" / "a.jsonl")}))
        assert antares.gateway.recorder.traffic is before
        assert antares.gateway.config.recording.path == str(path)


# --- the simulator ----------------------------------------------------------------------------------------------------


async def test_simulator_reads_what_the_gateway_recorded(path: Path) -> None:
    system = "You are the assistant of a bookshop. " * 60
    async with live(recording={"path": str(path)}) as antares:
        for turn in range(12):
            name = "tight" if turn % 3 == 0 else "batch"
            await antares.ask(chat(f"{system} Question {turn}", max_tokens=3 + turn), x_slo_class=name)
        await close(antares)

    workload = make_workload(str(path), arrivals="trace")
    assert [request.output_tokens for request in workload] == [min(3 + turn, 8) for turn in range(12)]
    assert {(r.slo_class, r.ttft_slo_s, r.tpot_slo_s) for r in workload} == {("tight", 0.5, 0.05), ("batch", 5.0, 1.0)}
    shared = [sum(a == b for a, b in zip(workload[0].blocks, later.blocks, strict=False)) for later in workload[1:]]
    assert min(shared) * 16 >= workload[0].prompt_tokens - 3 * 64

    result = CliRunner().invoke(app, ["simulate", "--trace", str(path), "--replicas", "search", "--json"])
    assert result.exit_code == 0, result.stderr
    (record,) = json.loads(result.stdout)["runs"][:1]
    assert record["class_names"] == {"1": "batch", "2": "tight"}
    assert record["hit_rate"] > 0.5
