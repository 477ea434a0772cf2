"""The channel from the step gate to the gateway, and the check of vLLM versions."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from engine_adapter.report_channel.messages import QueueReport
from engine_adapter.report_channel.server import ADDRESS_ENV, KEY_ENV
from engine_adapter.step_report import GateReport, StepReport
from engine_adapter.vllm.gate_channel import GateListener, GateReporter
from engine_adapter.vllm.versions import UnsupportedVllmError, require_gate, require_in_process
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.report_channel import KEY, LIMITS, report_client, report_server
from tests.fixtures.served import free_port


async def test_listener_receives_steps_and_counters() -> None:
    received: list[tuple[GateReport, list[StepReport]]] = []
    listener = GateListener(lambda report, steps: received.append((report, steps)))
    listener.open(asyncio.get_running_loop())
    try:
        reporter = GateReporter(listener.path, interval_s=1.0)
        reporter.report.steps = 2
        reporter.report.eligible["50"] = 7
        reporter.step(0.0, StepReport(3, 0, 40.5, 0.012))
        reporter.step(0.5, StepReport(4, 16, 41.0, 0.02, 2, 6, 3, 16))
        reporter.flush(0.6)
        async with asyncio.timeout(HANG_S):
            while not received:
                await asyncio.sleep(0.01)
    finally:
        listener.close()
    ((report, steps),) = received
    assert report.eligible == {"50": 7}
    assert steps == [StepReport(3, 0, 40.5, 0.012), StepReport(4, 16, 41.0, 0.02, 2, 6, 3, 16)]
    assert not Path(listener.path).exists()  # noqa: ASYNC240


def test_reporter_without_listener_never_raises(tmp_path: Path) -> None:
    for reporter in (GateReporter(None), GateReporter(str(tmp_path / "missing.sock"), interval_s=1e9)):
        for step in range(5000):
            reporter.step(float(step), StepReport(1, 0, 1.0, 0.01))
        reporter.flush(5000.0)


async def test_listener_ignores_invalid_datagrams() -> None:
    listener = GateListener(lambda report, steps: pytest.fail("no datagram is a valid report"))
    listener.open(asyncio.get_running_loop())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            for datagram in (b"", b"{", b"[]", b'{"gate": 3, "steps": []}', b'{"gate": [], "steps": [[1]]}'):
                sender.sendto(datagram, listener.path)
        await asyncio.sleep(0.1)
    finally:
        listener.close()


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1rc1"])
def test_gate_accepts_versions_in_range(version: str) -> None:
    require_gate(version)


@pytest.mark.parametrize("version", ["0.29.9", "0.33.0", "1.0.0", "dev"])
def test_in_process_engine_rejects_other_versions_with_a_fix(version: str) -> None:
    with pytest.raises(UnsupportedVllmError, match=r">=0\.30,<0\.33.*kind: http"):
        require_in_process(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0"])
def test_gate_rejects_other_versions_with_a_fix_for_servers(version: str) -> None:
    with pytest.raises(UnsupportedVllmError, match=r">=0\.26,<0\.34.*without --scheduler-cls and set send_slo: false"):
        require_gate(version)


async def test_reporter_of_a_server_sends_to_the_gateways_that_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv(ADDRESS_ENV, f"127.0.0.1:{port}")
    monkeypatch.setenv(KEY_ENV, KEY.decode())
    reporter = GateReporter(None)
    asked = 0

    def queue() -> QueueReport:
        nonlocal asked
        asked += 1
        return QueueReport(2, 1, 0.5)

    reporter.serve(LIMITS, queue)
    reporter.step(0.0, StepReport(9, 9, 9.0, 9.0))
    assert asked == 0, "no gateway, no report"
    async with report_client(port) as received:
        await eventually(lambda: received.connected == [LIMITS])
        await eventually(lambda: reporter._wanted)
        reporter.report.best_effort_preemptions = 4
        reporter.step(1.0, StepReport(3, 0, 40.5, 0.012))
        reporter.step(1.001, StepReport(4, 16, 41.0, 0.02, 2, 6, 3, 16))
        reporter.flush(1.002)
        await eventually(lambda: len(received.reports) == 2)
    first, second = received.reports
    assert [step.decode_requests for step in first.steps + second.steps] == [3, 4]
    assert second.gate.best_effort_preemptions == 4
    assert second.queue == QueueReport(2, 1, 0.5)


def test_ranks_of_a_server_cannot_share_a_report_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS_ENV, "127.0.0.1:9410")
    monkeypatch.setenv(KEY_ENV, KEY.decode())
    with pytest.raises(ValueError, match="one `vllm serve` per rank"):
        GateReporter(None).serve(LIMITS, QueueReport, ranks=2)


def test_engine_of_a_gateway_opens_no_report_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway's own environment may name a channel for its servers. Its engines would fight for the port."""
    with report_server() as other:
        monkeypatch.setenv(ADDRESS_ENV, f"127.0.0.1:{other.port}")
        monkeypatch.setenv(KEY_ENV, KEY.decode())
        GateReporter(str(tmp_path / "gate.sock")).serve(LIMITS, QueueReport)
        with pytest.raises(ValueError, match="cannot be used"):
            GateReporter(None).serve(LIMITS, QueueReport)
