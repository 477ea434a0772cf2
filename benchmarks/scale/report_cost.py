"""What the report channel costs: CPU time of both ends and bytes, for each step of an engine.

Both ends are the product's own, connected over TCP on this machine. They run in threads, whose CPU clocks are read. A
loop stands for the engine: it sleeps for a step, and reports it as the scheduler class does.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from benchmarks.faults.rig import free_port
from engine_adapter.engine import EngineState
from engine_adapter.report_channel.client import ReportClient
from engine_adapter.report_channel.messages import EngineLimits, Frames, QueueReport, Report
from engine_adapter.report_channel.server import ADDRESS_ENV, KEY_ENV
from engine_adapter.step_report import StepReport
from engine_adapter.vllm.gate_channel import GateReporter

STEPS_MS = (5, 20, 50)
"""Step times (ms): of a small model on a GPU, of an 8B model on an A100 under load, and of a CPU."""

MEASURED_S = 5.0
"""Seconds for each step time."""

KEY = "the key of this measurement, which protects nothing"

_THREAD = "antares-reports"


class Gateway(threading.Thread):
    """The gateway's end: receives reports, and learns from each step as the gateway does. Keeps the ``reports``."""

    def __init__(self, port: int) -> None:
        super().__init__(name="gateway", daemon=True)
        self.reports: list[Report] = []
        self.connected = threading.Event()
        self.dropped = 0
        self._port, self._state = port, EngineState()
        self._loop = asyncio.new_event_loop()

    def run(self) -> None:
        """Receive until `stop`."""
        client = ReportClient(
            "measured", "127.0.0.1", self._port, KEY.encode(),
            on_connected=lambda limits: self.connected.set(), on_report=self._on_report, on_lost=lambda: None,
        )  # fmt: skip
        receiving = self._loop.create_task(client.run())
        self._loop.run_forever()
        receiving.cancel()
        self._loop.run_until_complete(asyncio.wait([receiving]))

    def stop(self) -> None:
        """End the connection and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()

    def _on_report(self, report: Report | None, dropped: int) -> None:
        self.dropped = dropped
        if report is not None:
            self.reports.append(report)
            for step in report.steps:
                self._state.observe_step(step)


def message_cost(step_ms: float, measured_s: float = MEASURED_S) -> dict[str, Any]:
    """Return the cost of reporting steps of ``step_ms`` for ``measured_s`` seconds: microseconds and bytes a step."""
    port, reporter = free_port(), GateReporter(None)
    before = set(threading.enumerate())
    with _environment({ADDRESS_ENV: f"127.0.0.1:{port}", KEY_ENV: KEY}):
        reporter.serve(EngineLimits(256, 2048, 8192, kv_tokens=400_000), lambda: QueueReport(200, 12, 0.71))
    sender = next(thread for thread in threading.enumerate() if thread.name == _THREAD and thread not in before)
    gateway = Gateway(port)
    gateway.start()
    if not gateway.connected.wait(30):
        raise RuntimeError("the report channel did not connect within 30 s")
    reporter.report.eligible, reporter.report.batched = ({str(pace): 10**6 for pace in (30, 50, 100)} for _ in "ab")
    started = [_cpu_s(thread) for thread in (sender, gateway)]
    steps, engine_s, until = 0, 0.0, time.monotonic() + measured_s
    while time.monotonic() < until:
        time.sleep(step_ms / 1000)
        steps += 1
        reporter.report.steps += 1
        begun = time.thread_time()
        reporter.step(time.monotonic(), StepReport(200, 57, 812.25 + steps, step_ms / 1000 * 1.0173))
        engine_s += time.thread_time() - begun
    reporter.flush(time.monotonic())
    time.sleep(0.2)
    sender_s, gateway_s = (_cpu_s(thread) - at for thread, at in zip((sender, gateway), started, strict=True))
    gateway.stop()
    # As they were sent: both types have the order of the members of the message.
    sent = sum(len(msgspec.json.encode(report)) + Frames.PREFIX_BYTES for report in gateway.reports)
    return {
        "step_ms": step_ms,
        "steps": steps,
        "reports": len(gateway.reports),
        "received_steps": sum(len(report.steps) for report in gateway.reports),
        "dropped": gateway.dropped,
        "engine_us": round(engine_s / steps * 1e6, 2),
        "sender_us": round(sender_s / steps * 1e6, 2),
        "gateway_us": round(gateway_s / steps * 1e6, 2),
        "bytes": round(sent / steps, 1),
        "bytes_per_s": round(sent / measured_s),
    }


def _cpu_s(thread: threading.Thread) -> float:
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set ``variables`` while the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
