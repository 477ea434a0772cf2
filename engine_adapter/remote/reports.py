"""What a remote server says of its engine, and which source says it: the report channel, or else its ``/metrics``.

Without either, the engine's state is what this gateway sees: its own requests, and the timing of their streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from engine_adapter.engine import EngineEvents, EngineState
from engine_adapter.remote.proxy import HttpProxy
from engine_adapter.remote.server_metrics import ServerMetrics, read_metrics
from engine_adapter.report_channel.client import ReportClient
from engine_adapter.report_channel.messages import EngineLimits, QueueReport, Report
from engine_adapter.step_report import GateReport

CHANNEL, METRICS = "channel", "metrics"
"""Values of `ReportLog.source`."""

FOREIGN_S = 1.0
"""Seconds in which a sequence must be in every report to count as another client's. A report may be older than the end
of a request of this gateway, which it then still has."""


@dataclass(slots=True, frozen=True)
class ReportAddress:
    """Where a server's report channel is, and the key of both ends. ``host``: None for that of the server itself."""

    port: int
    key: bytes = field(repr=False)
    host: str | None = None

    def at(self, server: str) -> tuple[str, int, bytes]:
        """Return host, port and key of the channel of the server at the host ``server``."""
        return self.host or server, self.port, self.key


class Reports:
    """Keeps the state of a remote engine true to what its server says.

    Args:
        name: the engine's name.
        state: the engine's state, which this class writes.
        proxy: told whether the engine's own reports arrive.
        address: host, port and key of the report channel; None: there is none.
        may_preempt: whether requests reach the step gate, so that it can preempt best-effort ones.
    """

    def __init__(
        self,
        name: str,
        state: EngineState,
        proxy: HttpProxy,
        address: tuple[str, int, bytes] | None,
        may_preempt: Callable[[], bool],
    ) -> None:
        self.events = EngineEvents()
        self._state = state
        self._proxy = proxy
        self._may_preempt = may_preempt
        self._configured = (state.max_num_seqs, state.max_num_batched_tokens, state.prefix_caching)
        self._has_metrics = True
        self._last: ServerMetrics | None = None
        self._progress_at: float | None = None
        self._most_tokens = 0
        self._foreign = _Least()
        self._client: ReportClient | None = None
        self._receiving: asyncio.Task[None] | None = None
        if address is not None:
            self._client = ReportClient(
                name, *address, on_connected=self._on_connected, on_report=self._on_report, on_lost=self._on_lost
            )

    @property
    def progress_at(self) -> float | None:
        """When the engine last reported that it computed something (monotonic s); None without reports."""
        return self._progress_at if self._state.reports.source else None

    def start(self) -> None:
        """Connect to the report channel, if there is one, and stay connected."""
        if self._client is not None:
            self._receiving = asyncio.create_task(self._client.run(), name="reports")

    async def stop(self) -> None:
        """Close the connection. Idempotent."""
        receiving, self._receiving = self._receiving, None
        if receiving is not None:
            receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await receiving

    def on_down(self) -> None:
        """Forget what the server said: it may come back as another one. Reports that still arrive are newer."""
        if self._state.reports.source == CHANNEL:
            return
        state = self._state
        state.max_num_seqs, state.max_num_batched_tokens, state.prefix_caching = self._configured
        state.gate, state.kv_tokens, state.plans_ahead = GateReport(), 0, False
        self._has_metrics, self._last = True, None
        self._progress_at, self._most_tokens = None, 0
        self._set_source("")
        self._forget_foreign()

    async def read_metrics(self, get: Callable[[str], Awaitable[tuple[int, bytes] | None]]) -> None:
        """Read the server's ``/metrics`` with ``get``, unless the report channel delivers more than they say."""
        if self._state.reports.source == CHANNEL or not self._has_metrics:
            return
        answer = await get("/metrics")
        read = read_metrics(answer[1]) if answer is not None and answer[0] == 200 else None
        # The channel may have connected meanwhile.
        if self._state.reports.source == CHANNEL:
            return
        if read is None:
            self._has_metrics = answer is None
            self._set_source("")
            if not self._has_metrics:
                self._forget_foreign()
            return
        self._set_source(METRICS)
        self._state.reports.note(METRICS, time.monotonic())
        self._set_queue(read.queue)
        before, self._last = self._last, read
        # NOTE: not the change since ``before``. An address that leads to several servers gives their counts in turns.
        if self._progress_at is None or read.tokens > self._most_tokens:
            self._progress_at, self._most_tokens = time.monotonic(), read.tokens
        step = None if before is None else read.steps_since(before)
        if step is not None and (step.drafting_requests or self._state.acceptance.accepted):
            self._state.acceptance.observe(step)
        if read.kv_tokens and read.kv_tokens != self._state.kv_tokens:
            self._state.kv_tokens = read.kv_tokens
            self._on_capacity()

    def _on_connected(self, limits: EngineLimits) -> None:
        state = self._state
        if state.reports.source != CHANNEL and not state.reports.counts.get(CHANNEL):
            # Steps that were derived from streams include the network, and those of the report channel do not.
            state.step_time.forget()
        state.max_num_seqs = min(self._configured[0], limits.max_num_seqs)
        state.max_num_batched_tokens = limits.max_num_batched_tokens
        state.max_model_len = limits.max_model_len
        state.prefix_caching, state.plans_ahead = limits.prefix_caching, limits.plans_ahead
        self._set_gate(GateReport(preemptible=limits.preemptible, kv_tokens=limits.kv_tokens))
        # Drafts are counted once: those of the time until the next reading of the metrics are not known.
        self._last, self._progress_at = None, time.monotonic()
        self._set_source(CHANNEL)
        self._set_queue(QueueReport())
        self._on_capacity()

    def _on_report(self, report: Report | None, dropped: int) -> None:
        state, now = self._state, time.monotonic()
        state.reports.at, state.reports.dropped = now, dropped
        if report is None:
            # No step ran lately, so the engine is idle. The report that said so may have been dropped.
            self._forget_foreign()
            return
        state.reports.note(CHANNEL, now)
        self._set_gate(report.gate)
        self._set_queue(report.queue)
        for step in report.steps:
            state.observe_step(step)
        if report.steps:
            self._progress_at = state.last_step_at = now
            self.events.on_step()

    def _on_lost(self) -> None:
        # The server may serve on. What it can do stays known until it is down.
        self._state.last_step_at = None
        self._set_source("")
        if not self._has_metrics:
            self._forget_foreign()
        if not self._state.alive:
            self.on_down()

    def _set_gate(self, gate: GateReport) -> None:
        gate.preemptible = gate.preemptible and self._may_preempt()
        self._state.gate = gate
        self._state.kv_tokens = gate.kv_tokens or self._state.kv_tokens

    def _set_queue(self, queue: QueueReport) -> None:
        state = self._state
        state.engine_running, state.engine_waiting = queue.running, queue.waiting
        state.kv_usage = queue.kv_usage
        # All own sequences may run, so these are the least that others have.
        self._set_foreign(self._foreign.least(time.monotonic(), max(0, queue.running - self._proxy.sequences)))

    def _set_foreign(self, sequences: int) -> None:
        state = self._state
        state.foreign_sequences = sequences
        state.foreign_decodes = sequences if state.reports.source == CHANNEL else 0
        # Their part of the memory is not reported.
        state.foreign_tokens = state.kv_usage * state.kv_tokens * min(1.0, sequences / max(1, state.engine_running))

    def _forget_foreign(self) -> None:
        self._foreign = _Least()
        self._set_foreign(0)

    def _set_source(self, source: str) -> None:
        self._state.reports.source = source
        self._proxy.set_reported(steps=source == CHANNEL, queue=bool(source))

    def _on_capacity(self) -> None:
        if self._state.alive:
            self.events.on_limits()


@dataclass(slots=True)
class _Least:
    """The least of the numbers that were noted in the last `FOREIGN_S` seconds or more, and at least of two."""

    _since: float = 0.0
    _before: int = 0
    _now: int = 0

    def least(self, now: float, number: int) -> int:
        """Note ``number`` at ``now`` (monotonic s), and return the least one."""
        if now >= self._since + FOREIGN_S:
            self._since, self._before, self._now = now, self._now, number
        else:
            self._now = min(self._now, number)
        return min(self._before, self._now)
