"""The report channel between a server's scheduler class and gateways: keys, versions, bounds, slow and lost ends."""

from __future__ import annotations

import asyncio
import socket
import struct
import time

import msgspec
import pytest

from engine_adapter.report_channel import client as client_module
from engine_adapter.report_channel import server as server_module
from engine_adapter.report_channel.messages import (
    LENGTH_BYTES,
    MAX_REPORT_BYTES,
    VERSION,
    Answer,
    Challenge,
    ChannelError,
    EngineLimits,
    Frames,
    Proofs,
    QueueReport,
    Report,
    Welcome,
    checked_key,
    decoded,
    framed,
    handshake_length,
    new_nonce,
)
from engine_adapter.report_channel.server import ADDRESS_ENV, KEY_ENV, ReportServer
from engine_adapter.step_report import StepReport
from tests.fixtures.live_server import eventually
from tests.fixtures.report_channel import KEY, LIMITS, encoded, report_client, report_server, scripted_channel


@pytest.fixture(autouse=True)
def _retries_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", (0.02,))


async def test_reports_reach_every_gateway_in_order() -> None:
    with report_server() as server:
        async with report_client(server.port) as one, report_client(server.port) as two:
            await eventually(lambda: len(one.connected) + len(two.connected) == 2 and len(server._links) == 2)
            for count in (1, 2, 3):
                server.publish(encoded(count, running=count, waiting=4, kv_usage=0.5))
            await eventually(lambda: len(one.reports) == len(two.reports) == 3)
    assert one.connected == [LIMITS]
    assert [len(report.steps) for report in one.reports] == [1, 2, 3]
    assert one.reports[2].queue == QueueReport(3, 4, 0.5)
    assert one.reports[2].steps[0] == StepReport(3, 0, 100.0, 0.01)
    assert two.reports == one.reports
    assert one.dropped == two.dropped == 0


async def test_server_without_gateways_wants_no_reports() -> None:
    with report_server() as server:
        assert not server.wanted
        async with report_client(server.port) as received:
            await eventually(lambda: server.wanted and bool(received.connected))
        await eventually(lambda: not server.wanted)


async def test_heartbeats_arrive_while_the_engine_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(client_module, "STALE_S", 1.0)
    with report_server() as server:
        async with report_client(server.port) as received:
            await eventually(lambda: received.heartbeats >= 3)
    assert received.reports == []


async def test_gateway_with_another_key_gets_no_report(caplog: pytest.LogCaptureFixture) -> None:
    with report_server() as server:
        async with report_client(server.port, b"another key of 26 bytes, no") as received:
            await eventually(lambda: "the server has another key" in caplog.text)
            assert not server.wanted
    assert received.connected == []
    assert "compare its ANTARES_REPORT_KEY with report.key_env" in caplog.text


async def test_key_does_not_cross_the_network() -> None:
    seen = bytearray()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(4096):
                seen.extend(data)
                sink.write(data)

        await asyncio.wait(
            [asyncio.create_task(copy(reader, up_writer)), asyncio.create_task(copy(up_reader, writer))],
            return_when=asyncio.FIRST_COMPLETED,
        )
        up_writer.close()

    with report_server() as server:
        async with scripted_channel(relay) as port, report_client(port) as received:
            await eventually(lambda: bool(received.connected))
    assert len(seen) > 100
    assert KEY not in seen
    assert KEY.hex().encode() not in seen


async def _read(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(handshake_length(await reader.readexactly(LENGTH_BYTES)))


async def test_recorded_answer_does_not_open_another_connection() -> None:
    with report_server() as server:
        recorded = b""
        for attempt in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            challenge = decoded(await _read(reader), Challenge)
            if attempt == 0:
                nonce = new_nonce()
                recorded = framed(Answer(nonce, Proofs(KEY, challenge.nonce, nonce).gateway))
            writer.write(recorded)
            welcome = decoded(await _read(reader), Welcome)
            assert bool(welcome.error) == (attempt == 1)
            assert (welcome.limits is None) == (attempt == 1)
            writer.close()


async def test_gateway_does_not_believe_a_server_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(framed(Challenge(VERSION, new_nonce())))
        await _read(reader)
        writer.write(framed(Welcome(b"\0" * 32, LIMITS)))
        await reader.read(1)

    async with scripted_channel(impostor) as port, report_client(port) as received:
        await eventually(lambda: "what answers there does not have the key" in caplog.text)
    assert received.connected == []


async def test_other_version_is_refused_with_a_fix(caplog: pytest.LogCaptureFixture) -> None:
    async def newer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(framed(Challenge(VERSION + 1, new_nonce())))
        await reader.read(1)

    async with scripted_channel(newer) as port, report_client(port) as received:
        await eventually(lambda: "run the same release of Antares in both" in caplog.text)
    assert received.connected == []
    assert caplog.text.count("run the same release") == 1, "logged once, not at each attempt"


@pytest.mark.parametrize(
    "greeting",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", struct.pack(">I", 9) + b"not JSON!", struct.pack(">I", 1 << 31), b""],
)
async def test_gateway_survives_other_servers(greeting: bytes, caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.write(greeting)
        writer.close()

    async with scripted_channel(other) as port, report_client(port) as received:
        await eventually(lambda: calls >= 3)
    assert received.connected == []
    assert "no reports from" in caplog.text


async def _welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Frames:
    """The server's side of the handshake."""
    server_nonce = new_nonce()
    writer.write(framed(Challenge(VERSION, server_nonce)))
    answer = decoded(await _read(reader), Answer)
    proofs = Proofs(KEY, server_nonce, answer.nonce)
    writer.write(framed(Welcome(proofs.server, LIMITS)))
    return Frames(proofs.session)


@pytest.mark.parametrize("fault", ["forged", "replayed", "oversized", "unreadable", "negative", "silent"])
async def test_bad_reports_end_the_connection_and_nothing_is_believed(
    fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "STALE_S", 0.3)

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = await _welcome(reader, writer)
        good = frames.seal(encoded(1), 0)
        writer.write(good)
        if fault == "forged":
            frame = bytearray(frames.seal(encoded(2), 0))
            frame[-3] ^= 1
            writer.write(frame)
        elif fault == "replayed":
            writer.write(good)
        elif fault == "oversized":
            writer.write(struct.pack(">IQ", MAX_REPORT_BYTES + 1, 0) + bytes(16))
        elif fault == "unreadable":
            writer.write(frames.seal(b'{"steps": 3}', 0))
        elif fault == "negative":
            bad = {"steps": [[1, 0, 1.0, -0.5]], "gate": {}, "queue": {}}
            writer.write(frames.seal(msgspec.json.encode(bad), 0))
        await reader.read(1)

    async with scripted_channel(server) as port, report_client(port) as received:
        await eventually(lambda: len(received.connected) >= 2)
    assert received.lost >= 1
    assert all(len(report.steps) == 1 and report.steps[0].elapsed_s == 0.01 for report in received.reports)
    assert "no reports from" in caplog.text


async def test_gateway_connects_again_after_the_server_was_restarted() -> None:
    with report_server() as first:
        port = first.port
        async with report_client(port) as received:
            await eventually(lambda: len(received.connected) == 1)
            first.close()
            await eventually(lambda: received.lost == 1)
            with report_server(port) as second:
                await eventually(lambda: second.wanted and len(received.connected) == 2)
                second.publish(encoded(1))
                await eventually(lambda: len(received.reports) == 1)


async def test_slow_gateway_loses_reports_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_UNSENT_BYTES", 1 << 14)
    large = encoded(900, running=8)
    with report_server() as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", server.port))
        reader, writer = await asyncio.open_connection(sock=slow, limit=4096)
        challenge, nonce = decoded(await _read(reader), Challenge), new_nonce()
        proofs = Proofs(KEY, challenge.nonce, nonce)
        writer.write(framed(Answer(nonce, proofs.gateway)))
        assert decoded(await _read(reader), Welcome).limits == LIMITS
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with report_client(server.port) as quick:
            await eventually(lambda: len(server._links) == 2)
            longest, count = 0.0, 400
            for sent in range(count):
                began = time.perf_counter()
                server.publish(large)
                longest = max(longest, time.perf_counter() - began)
                await eventually(lambda sent=sent: len(quick.reports) + quick.dropped > sent)  # type: ignore[misc]
            await eventually(lambda: any(link.dropped for link in server._links))
            assert len(quick.reports) + quick.dropped >= count
            assert len(quick.reports) > count / 2
        # The memory is bounded: at most the limit and one report wait.
        waiting = [link.writer.transport.get_write_buffer_size() for link in server._links]
        assert max(waiting) <= (1 << 14) + len(large) + Frames.PREFIX_BYTES
        writer.transport.abort()
    assert longest < 1


def test_publishing_never_waits_for_the_thread() -> None:
    server = ReportServer("127.0.0.1", 0, KEY, LIMITS)
    server.close()
    for _ in range(1000):
        server.publish(encoded())
    assert server._dropped >= 1000 - server_module.MAX_HANDED_OVER
    server.close()


async def test_connections_without_proof_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 0.3)
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 4)
    with report_server() as server:
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(8)]
        assert len(server._tasks) <= 4
        # All are closed in the end, and a gateway can connect then.
        for reader, _ in idle:
            async with asyncio.timeout(30):
                with pytest.raises((OSError, EOFError)):
                    while True:
                        await reader.readexactly(1)
        async with report_client(server.port) as received:
            await eventually(lambda: received.connected == [LIMITS])
        for _, writer in idle:
            writer.close()


@pytest.mark.parametrize(
    ("address", "key", "fix"),
    [
        ("9410", "k" * 16, "write it like 127.0.0.1:9410"),
        ("127.0.0.1:", "k" * 16, "write it like 127.0.0.1:9410"),
        ("127.0.0.1:99999", "k" * 16, "write it like 127.0.0.1:9410"),
        ("127.0.0.1:9410", "", "ANTARES_REPORT_KEY must have at least 16 bytes"),
        ("127.0.0.1:9410", "short", "openssl rand -hex 24"),
        ("192.0.2.1:9410", "k" * 16, "cannot be used"),
    ],
)
def test_wrong_settings_are_refused_with_a_fix(
    address: str, key: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS_ENV, address)
    monkeypatch.setenv(KEY_ENV, key)
    with pytest.raises(ValueError, match=fix):
        ReportServer.from_env(LIMITS)


def test_no_address_means_no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS_ENV, raising=False)
    assert ReportServer.from_env(LIMITS) is None


def test_port_in_use_is_refused_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with report_server() as server:
        monkeypatch.setenv(ADDRESS_ENV, f"127.0.0.1:{server.port}")
        monkeypatch.setenv(KEY_ENV, "k" * 16)
        with pytest.raises(ValueError, match=r"ANTARES_REPORT_ADDRESS .* cannot be used"):
            ReportServer.from_env(LIMITS)


def test_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="MY_KEY must have at least 16 bytes"):
        checked_key("short", "MY_KEY")
    assert checked_key("k" * 16, "MY_KEY") == b"k" * 16


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b'{"max_num_seqs": 0, "max_num_batched_tokens": 1, "max_model_len": 1}',
        b'{"max_num_seqs": "8", "max_num_batched_tokens": 1, "max_model_len": 1}',
        b"[" * 5000,
    ],
)
def test_bad_limits_are_not_believed(content: bytes) -> None:
    with pytest.raises(ChannelError):
        decoded(content, EngineLimits)


@pytest.mark.parametrize("queue", ['{"kv_usage": 1.5}', '{"running": -1}', '{"waiting": 1e300}'])
def test_bad_queues_are_not_believed(queue: str) -> None:
    with pytest.raises(ChannelError):
        decoded(f'{{"queue": {queue}}}'.encode(), Report)
