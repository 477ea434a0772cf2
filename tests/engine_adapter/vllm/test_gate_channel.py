"""The channel from the step gate to the gateway, and the check of vLLM versions."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from engine_adapter.step_report import GateReport, StepReport
from engine_adapter.vllm.gate_channel import GateListener, GateReporter
from engine_adapter.vllm.versions import UnsupportedVllmError, require_gate, require_in_process


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
        async with asyncio.timeout(5):
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
