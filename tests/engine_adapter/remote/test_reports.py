"""What a remote engine's state is, from the report channel, from the server's metrics, or from neither."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from engine_adapter.build import http_engine
from engine_adapter.engine import EngineEvents, EngineStartError, Receive, Scope, Send
from engine_adapter.remote import engine as engine_module
from engine_adapter.remote import reports as reports_module
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.remote.reports import ReportAddress
from engine_adapter.remote.server_metrics import ServerMetrics, read_metrics
from engine_adapter.report_channel import client as client_module
from engine_adapter.report_channel import server as server_module
from engine_adapter.report_channel.messages import EngineLimits, QueueReport, checked_key
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.report_channel import KEY, encoded, report_server

METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="small"} 3.0
vllm:num_requests_waiting{engine="0",model_name="small"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="small",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="small"} 0.25
vllm:cache_config_info{block_size="16",engine="0",kv_cache_size_tokens="4096",num_gpu_blocks="300"} 1.0
vllm:generation_tokens_total{engine="0",model_name="small"} 1000.0
vllm:generation_tokens_created{engine="0",model_name="small"} 1.7e+09
vllm:spec_decode_num_drafts_total{engine="0",model_name="small"} 100.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="small"} 300.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="small"} 150.0
"""


class SimulatedVllm:
    """Answers the probes of a gateway as vLLM does. ``metrics``: its ``/metrics``; None: it has none."""

    def __init__(self, metrics: bytes | None = METRICS) -> None:
        self.metrics = metrics
        self.healthy = True
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, body = (200, b"{}") if self.healthy else (503, b"{}")
        if scope["path"] == "/metrics":
            self.asked += 1
            status, body = (404, b"") if self.metrics is None else (200, self.metrics)
        elif scope["path"] == "/v1/models":
            card = {"id": "small", "object": "model", "owned_by": "vllm", "max_model_len": 1024}
            body = orjson.dumps({"object": "list", "data": [card]})
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(autouse=True)
def _probes_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PROBE_EVERY_S", 0.03)
    monkeypatch.setattr(engine_module, "PROBE_AGAIN_S", (0.03,))
    monkeypatch.setattr(client_module, "RETRY_S", (0.03,))
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 0.05)


@asynccontextmanager
async def engine_of(
    server: SimulatedVllm, port: int | None = None, key: bytes = KEY, **options: Any
) -> AsyncIterator[HttpEngine]:
    """An engine at ``server``. ``port``: that of its report channel."""
    async with serve(server) as url:
        address = None if port is None else ReportAddress(port, key)
        engine = HttpEngine("remote", url, report=address, max_num_seqs=64, **options)
        await engine.start(EngineEvents())
        try:
            yield engine
        finally:
            await engine.stop()


async def test_channel_gives_steps_queue_memory_and_limits() -> None:
    with report_server() as reports:
        async with engine_of(SimulatedVllm(), reports.port) as engine:
            state = engine.state
            await eventually(lambda: state.reports.source == "channel" and reports.wanted)
            assert (state.max_num_seqs, state.max_num_batched_tokens, state.max_model_len) == (8, 512, 1024)
            assert state.kv_tokens == 4096
            assert state.plans_ahead
            assert state.gate.preemptible
            reports.publish(encoded(40, running=3, waiting=2, kv_usage=0.5))
            await eventually(lambda: state.step_time.steps_seen == 40)
            assert (state.engine_running, state.engine_waiting, state.kv_usage) == (3, 2, 0.5)
    assert state.step_time.curve.step_s(3, 300) == pytest.approx(0.01, rel=0.05)
    assert state.gate.eligible == {"50": 3}


async def test_metrics_are_read_without_a_channel() -> None:
    server = SimulatedVllm()
    async with engine_of(server) as engine:
        state = engine.state
        await eventually(lambda: state.reports.source == "metrics")
        assert (state.engine_running, state.engine_waiting, state.kv_usage) == (3, 2, 0.25)
        assert state.kv_tokens == 4096
        assert not state.gate.preemptible, "no gate says that it preempts"
        assert state.max_num_seqs == 64


IDLE = METRICS.replace(b"} 3.0", b"} 0.0").replace(b"} 2.0", b"} 0.0")


async def test_sequences_that_stay_in_the_metrics_and_are_not_ours_are_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports_module, "FOREIGN_S", 0.1)
    server = SimulatedVllm()
    async with engine_of(server) as engine:
        state = engine.state
        await eventually(lambda: state.reports.source == "metrics")
        assert state.foreign_sequences == 0, "one reading may be of requests that have just ended"
        await eventually(lambda: state.foreign_sequences == 3)
        assert state.foreign_tokens == 0.25 * 4096
        assert state.foreign_decodes == 0, "the times of our own streams have their cost"
        server.metrics = IDLE
        await eventually(lambda: state.foreign_sequences == 0)
        assert state.foreign_tokens == 0
        server.metrics = METRICS
        await eventually(lambda: state.foreign_sequences == 3)
        server.metrics = b""
        await eventually(lambda: state.reports.source == "")
        assert state.foreign_sequences == 0, "nothing is known of them any more"


async def test_foreign_sequences_are_forgotten_with_the_server_but_not_with_one_slow_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reports_module, "FOREIGN_S", 0.1)
    server = SimulatedVllm()
    async with engine_of(server) as engine:
        state = engine.state
        await eventually(lambda: state.foreign_sequences == 3)
        await engine._reports.read_metrics(_no_answer)
        assert (state.reports.source, state.foreign_sequences) == ("", 3)
        server.healthy = False
        await eventually(lambda: not state.alive)
        assert state.foreign_sequences == 0


async def _no_answer(path: str) -> None:
    return None


async def test_own_requests_are_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports_module, "FOREIGN_S", 0.1)
    server = SimulatedVllm()
    async with engine_of(server) as engine:
        engine._proxy.sequences = 2
        asked = server.asked
        await eventually(lambda: server.asked > asked + 10)
        assert engine.state.foreign_sequences == 1


async def test_foreign_decodes_of_the_channel_end_when_the_engine_idles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report that says so may have been dropped: a heartbeat without one means the same."""
    monkeypatch.setattr(reports_module, "FOREIGN_S", 0.0)
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 0.4)
    with report_server() as reports:
        async with engine_of(SimulatedVllm(None), reports.port) as engine:
            state = engine.state
            await eventually(lambda: state.reports.source == "channel" and reports.wanted)
            for _ in range(3):
                reports.publish(encoded(1, running=3, waiting=2, kv_usage=0.5))
                await asyncio.sleep(0.05)
            await eventually(lambda: state.foreign_decodes == 3)
            assert state.foreign_tokens == 0.5 * state.kv_tokens
            await eventually(
                lambda: (state.foreign_sequences, state.foreign_decodes, state.foreign_tokens) == (0, 0, 0)
            )


async def test_progress_is_when_the_metrics_last_counted_new_tokens() -> None:
    server = SimulatedVllm()
    async with engine_of(server) as engine:
        reports = engine._reports
        await eventually(lambda: engine.state.reports.source == "metrics")
        began, asked = reports.progress_at, server.asked
        assert began is not None
        await eventually(lambda: server.asked > asked + 3)
        assert reports.progress_at == began
        more = METRICS.replace(b"} 1000.0", b"} 1001.0")
        server.metrics = more
        await eventually(lambda: (reports.progress_at or 0.0) > began)
        # Neither a reading that fails nor another server at the same address is progress.
        progress_at = reports.progress_at
        await reports.read_metrics(_no_answer)
        assert reports.progress_at is None
        for server.metrics in (METRICS, more, METRICS, more):
            asked = server.asked
            await eventually(lambda asked=asked: server.asked > asked + 1)
        assert reports.progress_at == progress_at


async def test_progress_is_when_the_channel_last_brought_steps() -> None:
    with report_server() as server:
        async with engine_of(SimulatedVllm(None), server.port) as engine:
            reports, state = engine._reports, engine.state
            await eventually(lambda: state.reports.source == "channel" and server.wanted)
            began, heard = reports.progress_at, state.reports.at
            assert began is not None
            await eventually(lambda: state.reports.at != heard)
            assert reports.progress_at == began, "a heartbeat is no step"
            server.publish(encoded(1, running=1, waiting=0, kv_usage=0.5))
            await eventually(lambda: (reports.progress_at or 0.0) > began)


async def test_drafts_in_metrics_become_tokens_per_step() -> None:
    """Of 100 decodes between two readings, all had 3 drafts, and 150 of 300 were accepted: 2.5 tokens in a step."""
    server = SimulatedVllm()
    async with engine_of(server) as engine:
        await eventually(lambda: engine.state.reports.source == "metrics")
        assert engine.state.tokens_per_step == 1
        later = METRICS.replace(b"} 1000.0", b"} 1250.0").replace(b"} 100.0", b"} 200.0")
        server.metrics = later.replace(b"} 300.0", b"} 600.0").replace(b"} 150.0", b"} 300.0")
        await eventually(lambda: engine.state.tokens_per_step != 1)
        assert engine.state.tokens_per_step == pytest.approx(2.5)
        assert engine.state.acceptance.accepted_tokens == 150


@pytest.mark.parametrize("metrics", [None, b"", b"other_metric 3\n", b"\xff\xfe{"])
async def test_server_without_vllm_metrics_is_asked_once(metrics: bytes | None) -> None:
    server = SimulatedVllm(metrics)
    async with engine_of(server) as engine:
        await eventually(lambda: server.asked == 1)
        await asyncio.sleep(0.15)
        assert server.asked == 1
        assert engine.state.reports.source == ""
        assert engine.state.alive
        # A server that was replaced may have them.
        server.metrics, server.healthy = METRICS, False
        await eventually(lambda: not engine.state.alive)
        server.healthy = True
        await eventually(lambda: engine.state.reports.source == "metrics")


async def test_lost_channel_falls_back_to_metrics_and_returns() -> None:
    with report_server() as first:
        port = first.port
        async with engine_of(SimulatedVllm(), port) as engine:
            state = engine.state
            await eventually(lambda: first.wanted)
            first.publish(encoded(1, running=8, kv_usage=0.75))
            await eventually(lambda: state.last_step_at is not None)
            first.close()
            await eventually(lambda: state.reports.source == "metrics")
            assert (state.engine_running, state.kv_usage) == (3, 0.25)
            assert state.last_step_at is None, "or the engine's current step would count as overdue"
            assert state.gate.preemptible, "the server still does it"
            assert state.max_num_seqs == 8
            with report_server(port) as second:
                await eventually(lambda: state.reports.source == "channel" and second.wanted)
                second.publish(encoded(1, running=5, kv_usage=0.6))
                await eventually(lambda: state.engine_running == 5)


async def test_server_that_was_replaced_by_another_one_is_not_believed_to_be_the_same() -> None:
    server = SimulatedVllm(None)
    with report_server() as reports:
        async with engine_of(server, reports.port) as engine:
            state = engine.state
            await eventually(lambda: state.reports.source == "channel")
            server.healthy = False
            reports.close()
            await eventually(lambda: not state.alive and state.reports.source == "")
            assert not state.gate.preemptible
            assert (state.max_num_seqs, state.kv_tokens) == (64, 0)


@pytest.mark.parametrize("options", [{"send_slo": False}, {"max_connections": 80}])
async def test_preemption_is_not_counted_on_where_requests_cannot_reach_it(options: dict[str, Any]) -> None:
    """Without a pace on the wire the gate preempts nothing; 64 connections do not hold 2 times 40 requests."""
    limits = EngineLimits(40, 512, 1024, kv_tokens=4096, preemptible=True)
    with report_server(limits=limits) as reports:
        async with engine_of(SimulatedVllm(), reports.port, **options) as engine:
            await eventually(lambda: engine.state.reports.source == "channel")
            assert not engine.state.gate.preemptible


async def test_wrong_key_leaves_the_engine_usable() -> None:
    with report_server() as reports:
        async with engine_of(SimulatedVllm(), reports.port, b"not the key of the server") as engine:
            await eventually(lambda: engine.state.reports.source == "metrics")
            assert engine.state.alive
            assert not reports.wanted


def test_key_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    report: dict[str, Any] = {"port": 9410, "host": None, "key_env": "REPORT_KEY"}

    def build() -> Any:
        return http_engine(api_key_env=None, report=report, name="remote", base_url="http://127.0.0.1:9")

    with pytest.raises(EngineStartError, match=r"report\.key_env names REPORT_KEY.*not set"):
        build()
    monkeypatch.setenv("REPORT_KEY", "short")
    with pytest.raises(EngineStartError, match="REPORT_KEY must have at least 16 bytes"):
        build()
    monkeypatch.setenv("REPORT_KEY", "k" * 16)
    assert build().name == "remote"
    report["port"] = None  # a server whose entry in `discover.file` has no port
    assert build().name == "remote"


@pytest.mark.parametrize("given", ["secret-key\n", " secret-key\r\n", "secret-key"])
def test_space_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """A Secret made by ``echo``, or a file of variables with Windows' line ends."""
    monkeypatch.setenv("ENGINE_KEY", given)
    engine = http_engine(api_key_env="ENGINE_KEY", name="remote", base_url="http://127.0.0.1:9")
    assert isinstance(engine, HttpEngine)
    assert engine._api_key == "secret-key"
    assert checked_key(f"{KEY.decode()}\n", "REPORT_KEY") == KEY


@pytest.mark.parametrize("given", ["one\ntwo", "schlüssel", "a\tb"])
def test_value_that_is_no_key_is_named_and_not_quoted(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("ENGINE_KEY", given)
    with pytest.raises(EngineStartError, match="api_key_env: the key in ENGINE_KEY has a line break") as raised:
        http_engine(api_key_env="ENGINE_KEY", name="remote", base_url="http://127.0.0.1:9")
    assert given not in str(raised.value)
    monkeypatch.setenv("ENGINE_KEY", "\n")
    with pytest.raises(EngineStartError, match="not set"):
        http_engine(api_key_env="ENGINE_KEY", name="remote", base_url="http://127.0.0.1:9")


def test_address_does_not_show_its_key() -> None:
    assert "tests" not in repr(ReportAddress(1, KEY))


def test_metrics_of_several_ranks_are_added_up() -> None:
    both = METRICS + METRICS.replace(b'engine="0"', b'engine="1"').replace(b"} 0.25", b"} 0.75")
    read = read_metrics(both)
    assert read is not None
    assert read.queue == QueueReport(6, 4, 0.5)
    assert (read.kv_tokens, read.tokens) == (8192, 2000)


@pytest.mark.parametrize("value", [b"NaN", b"-1", b"+Inf", b"many", b"1e300"])
def test_odd_values_are_ignored(value: bytes) -> None:
    read = read_metrics(METRICS.replace(b"} 0.25", b"} " + value).replace(b"} 1000.0", b"} " + value))
    assert read is not None
    assert (read.queue.kv_usage, read.tokens) == (0, 0)


def test_restarted_server_adds_no_negative_decodes() -> None:
    before = ServerMetrics(QueueReport(), tokens=1000, drafting=100, draft_tokens=300, accepted_tokens=150)
    after = ServerMetrics(QueueReport(), tokens=10, drafting=1, draft_tokens=3, accepted_tokens=1)
    assert after.steps_since(before) is None
    assert before.steps_since(before) is None


async def test_limits_that_become_known_later_are_announced() -> None:
    announced: list[int] = []
    with report_server() as reports:
        async with serve(SimulatedVllm()) as url:
            engine = HttpEngine("remote", url, report=ReportAddress(reports.port, KEY))
            await engine.start(EngineEvents(on_limits=lambda: announced.append(engine.state.kv_tokens)))
            await eventually(lambda: announced == [4096])
            await engine.stop()


async def test_drafts_are_counted_once_when_the_source_changes() -> None:
    """Drafts that the channel reported are also in the counters of the metrics."""
    server = SimulatedVllm()
    with report_server() as first:
        port = first.port
        async with engine_of(server, port) as engine:
            await eventually(lambda: engine.state.reports.source == "channel")
            server.metrics = METRICS.replace(b"} 1000.0", b"} 1250.0").replace(b"} 300.0", b"} 600.0")
            first.close()
            await eventually(lambda: engine.state.reports.counts.get("metrics", 0) >= 3)
            assert engine.state.acceptance.draft_tokens == 0


@pytest.mark.parametrize(
    "after",
    [
        {"tokens": 5000, "drafting": 120, "draft_tokens": 330, "accepted_tokens": 900},
        {"tokens": 5000, "drafting": 900, "draft_tokens": 330, "accepted_tokens": 160},
        {"tokens": 5000, "drafting": 90, "draft_tokens": 330, "accepted_tokens": 160},
        {"tokens": 1000, "drafting": 110, "draft_tokens": 330, "accepted_tokens": 160},
    ],
)
def test_counters_that_are_not_of_one_server_say_nothing_of_drafts(after: dict[str, int]) -> None:
    before = ServerMetrics(QueueReport(), tokens=1000, drafting=100, draft_tokens=300, accepted_tokens=150)
    assert ServerMetrics(QueueReport(), **after).steps_since(before) is None
