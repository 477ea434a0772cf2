"""Traces of live requests, in a stand-in for an OTLP/HTTP collector that decodes what the real exporter sends."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from benchmarks.faults.server import FaultyServer
from engine_adapter.engine import EngineLost, Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from gateway.observability.recorder import ObservabilityError
from gateway.observability.trace_context import read_trace_context
from gateway.observability.tracing import spans_url
from tests.fixtures.live_gateway import CHAT, Live, chat, fast_engine, live
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.otlp_collector import StandInCollector, attributes, collecting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
CANARY = "xylophone-canary-7261"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInCollector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collecting() as stand_in:
        yield stand_in


def tracing(collector: StandInCollector, **more: Any) -> dict[str, Any]:
    return {"tracing": {"enabled": True, "endpoint": collector.url, "sample_ratio": 1.0, **more}}


async def test_finished_request_has_a_server_span_and_its_phases(collector: StandInCollector) -> None:
    began = time.time_ns()
    async with live(**tracing(collector)) as antares:
        headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "x-request-id": "mine"}
        answer = await antares.http.post(CHAT, json=chat(CANARY, stream=True, max_tokens=4), headers=headers)
        assert answer.status_code == 200
        await eventually(lambda: collector.servers)

    (server,) = collector.servers
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    assert server.name == "chat simulated"
    found = attributes(server)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "simulated"
    assert found["gen_ai.usage.input_tokens"] > 1
    assert found["gen_ai.usage.output_tokens"] == 4
    assert found["http.route"] == CHAT
    assert found["http.response.status_code"] == 200
    assert (found["antares.outcome"], found["antares.slo.attained"]) == ("finished", True)
    assert (found["antares.tenant"], found["antares.slo.class"]) == ("anonymous", "chat")
    assert (found["antares.slo.ttft_ms"], found["antares.slo.tpot_ms"]) == (5000, 1000)
    assert found["antares.request.client_id"] == "mine"
    assert found["antares.engine"] == "simulated"
    assert found["antares.predicted.ttft_ms"] > 0
    assert found["gen_ai.response.time_to_first_chunk"] == pytest.approx(found["antares.ttft_ms"] / 1000, abs=2e-6)
    assert 0 < found["antares.ttft_ms"] <= found["antares.e2e_ms"]

    children = collector.children(server)
    assert [child.name for child in children] == ["predict", "queue", "prefill", "decode"]
    assert {child.trace_id for child in children} == {server.trace_id}
    assert len({span.span_id for span in collector.spans}) == 5
    times = [t for c in children for t in (c.start_time_unix_nano, c.end_time_unix_nano)]
    assert times == sorted(times)
    assert began <= server.start_time_unix_nano <= times[0]
    assert times[-1] <= server.end_time_unix_nano <= time.time_ns()
    assert attributes(children[1])["antares.queue.waiting"] == 0
    resource = collector.resources[0]
    assert resource["service.name"] == "antares"
    assert (resource["host.name"], resource["process.pid"]) == (socket.gethostname(), os.getpid())


async def test_no_span_contains_text_of_the_request(collector: StandInCollector) -> None:
    async with live(**tracing(collector)) as antares:
        await antares.ask(chat(CANARY, user="person@example.org"), authorization="Bearer secret-key-1234567890")
        await antares.ask(chat(CANARY), x_slo_ttft_ms="0.001")
        await eventually(lambda: len(collector.servers) == 2)

    assert b"xylophone" not in b"".join(collector.bodies)
    assert b"secret-key" not in b"".join(collector.bodies)
    assert b"person@" not in b"".join(collector.bodies)


async def test_rejected_request_has_a_queue_span_and_the_attainable_value(collector: StandInCollector) -> None:
    async with live(**tracing(collector)) as antares:
        await antares.ask(x_slo_ttft_ms="0.001")
        await eventually(lambda: collector.servers)

    (server,) = collector.servers
    found = attributes(server)
    assert (found["antares.outcome"], found["antares.reason"]) == ("rejected", "ttft_unattainable")
    assert found["http.response.status_code"] == 429
    assert found["antares.rejection.attainable_ms"] > 0
    assert server.status.code == Status.STATUS_CODE_UNSET
    assert [child.name for child in collector.children(server)] == ["predict", "queue"]


async def test_failover_has_a_span_of_the_failed_attempt(collector: StandInCollector) -> None:
    async def dying(scope: Scope, receive: Receive, send: Send) -> None:
        raise EngineLost

    bad = fast_engine(name="bad")
    bad.stub = dying
    async with live(bad, more_engines=[fast_engine(name="good")], **tracing(collector)) as antares:
        assert (await antares.ask()).status_code == 200
        await eventually(lambda: collector.servers)

    children = collector.children(collector.servers[0])
    assert [child.name for child in children] == ["predict", "queue", "prefill", "queue", "prefill", "decode"]
    assert (children[2].status.code, children[2].status.message) == (Status.STATUS_CODE_ERROR, "lost")
    assert attributes(children[2])["antares.engine"] == "bad"
    assert attributes(children[4])["antares.engine"] == "good"


async def test_failed_request_has_an_error_status(collector: StandInCollector) -> None:
    async def dying(scope: Scope, receive: Receive, send: Send) -> None:
        raise EngineLost

    engine = fast_engine()
    engine.stub = dying
    async with live(engine, **tracing(collector)) as antares:
        assert (await antares.ask()).status_code == 503
        await eventually(lambda: collector.servers)

    (server,) = collector.servers
    assert (server.status.code, attributes(server)["error.type"]) == (Status.STATUS_CODE_ERROR, "engine_lost")


async def headers_at_engine(antares: Live, **headers: str) -> dict[str, str]:
    seen: dict[str, str] = {}
    inner = antares.engine.app

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        await inner(scope, receive, send)

    antares.engine.stub = recording
    assert (await antares.ask(**headers)).status_code == 200
    return dict(seen)


async def test_engine_gets_the_gateways_span_as_parent(collector: StandInCollector) -> None:
    async with live(**tracing(collector)) as antares:
        sent = await headers_at_engine(antares, traceparent=TRACEPARENT, tracestate="v=1", baggage="user=7")
        await eventually(lambda: collector.servers)

    assert sent["traceparent"] == f"00-{TRACE}-{collector.servers[0].span_id.hex()}-01"
    assert (sent["tracestate"], sent["baggage"]) == ("v=1", "user=7")


async def test_engine_gets_a_new_trace_without_a_client_context(collector: StandInCollector) -> None:
    async with live(**tracing(collector)) as antares:
        sent = await headers_at_engine(antares, traceparent="00-zz-1-1")
        await eventually(lambda: collector.servers)

    trace_id, span_id = (getattr(collector.servers[0], name).hex() for name in ("trace_id", "span_id"))
    assert sent["traceparent"] == f"00-{trace_id}-{span_id}-01"
    assert not collector.servers[0].parent_span_id


async def test_context_passes_unchanged_while_tracing_is_off(antares: Live) -> None:
    sent = await headers_at_engine(antares, traceparent=TRACEPARENT, tracestate="v=1")
    assert (sent["traceparent"], sent["tracestate"]) == (TRACEPARENT, "v=1")


async def test_unsampled_client_context_is_passed_on_and_not_exported(collector: StandInCollector) -> None:
    async with live(**tracing(collector)) as antares:
        sent = await headers_at_engine(antares, traceparent=TRACEPARENT[:-1] + "0")
        await antares.ask(x_request_id="sampled")
        await eventually(lambda: collector.servers)

    assert sent["traceparent"].startswith(f"00-{TRACE}-")
    assert sent["traceparent"].endswith("-00")
    assert PARENT not in sent["traceparent"]
    assert {attributes(s)["antares.request.client_id"] for s in collector.servers} == {"sampled"}


async def test_ratio_0_samples_only_what_the_client_samples(collector: StandInCollector) -> None:
    async with live(**tracing(collector, sample_ratio=0)) as antares:
        for _ in range(5):
            await antares.ask()
        await antares.ask(traceparent=TRACEPARENT)
        await eventually(lambda: collector.servers)

    assert [server.trace_id.hex() for server in collector.servers] == [TRACE]


async def test_environment_sets_endpoint_headers_service_and_sampler(
    collector: StandInCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=llm")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gateway-7")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=rack-3")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    async with live(tracing={"enabled": True}) as antares:
        await antares.ask()
        await eventually(lambda: collector.servers)

    resource = collector.resources[0]
    assert (resource["service.name"], resource["host.name"]) == ("gateway-7", "rack-3")
    assert collector.headers[0]["x-team"] == "llm"


async def test_disabled_sdk_traces_nothing(collector: StandInCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with live(**tracing(collector)) as antares:
        await antares.ask()
        assert antares.gateway.recorder.sampler is None
    assert collector.spans == []


@pytest.mark.process
async def test_slow_collector_delays_and_loses_no_request(
    collector: StandInCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    collector.delay_s = 1.0
    async with live(**tracing(collector)) as antares:
        began = time.monotonic()
        answers = await asyncio.gather(*(antares.ask(chat(max_tokens=2)) for _ in range(40)))
        assert time.monotonic() - began < 5
        assert {answer.status_code for answer in answers} == {200}
        assert antares.gateway.recorder.sinks[0].dropped > 0
        assert 'antares_records_dropped_total{sink="traces"} 0.0' not in (await antares.http.get("/metrics")).text
        assert antares.is_idle()


@pytest.mark.process
async def test_dead_collector_loses_no_request_and_delays_no_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    async with live(tracing={"enabled": True, "endpoint": "http://127.0.0.1:9", "sample_ratio": 1}) as antares:
        for _ in range(3):
            assert (await antares.ask()).status_code == 200
        began = time.monotonic()
        await antares.gateway.stop()
        assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        "x" * 10_000,
    ],
)
def test_malformed_traceparent_is_ignored(header: str) -> None:
    assert read_trace_context(header) is None


def test_traceparent_of_a_later_version_is_read() -> None:
    context = read_trace_context(f"01-{TRACE}-{PARENT}-03-more", "a=1," * 200)
    assert context is not None
    assert (context.trace_id, context.parent_id, context.sampled, context.state) == (TRACE, PARENT, True, "")


def test_endpoint_may_have_the_path_or_not() -> None:
    assert spans_url("http://c:4318/") == spans_url("http://c:4318/v1/traces") == "http://c:4318/v1/traces"


async def test_remote_server_gets_the_gateways_span_as_parent(collector: StandInCollector) -> None:
    seen: dict[str, str] = {}
    server = FaultyServer()

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == CHAT:
            seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        await server(scope, receive, send)

    async with serve(recording) as url, live(HttpEngine("remote", url), **tracing(collector)) as antares:
        answer = await antares.ask(chat(model="m"), traceparent=TRACEPARENT, tracestate="v=1", baggage="user=7")
        assert answer.status_code == 200, answer.text
        await eventually(lambda: collector.servers)

    assert seen["traceparent"] == f"00-{TRACE}-{collector.servers[0].span_id.hex()}-01"
    assert (seen["tracestate"], seen["baggage"]) == ("v=1", "user=7")


async def test_missing_extra_is_named_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gateway.observability.tracing", None)
    with pytest.raises(ObservabilityError, match=r"pip install -e '\.\[otel\]' in your clone"):
        async with live(tracing={"enabled": True}):
            pass


@pytest.mark.process
def test_command_line_and_app_load_no_opentelemetry() -> None:
    code = "import sys, gateway.cli, gateway.app; print(*[m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
