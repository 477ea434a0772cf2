"""Metrics, status and dashboard, and the absence of prompt text in them."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from engine_adapter.engine import Receive, Scope, Send
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_report import StepReport
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.observability.state_metrics import METRIC_ALIASES
from tests.fixtures.live_gateway import CHAT, CLASSES, TEXT, Live, chat, fast_engine, live
from tests.fixtures.live_server import eventually
from tests.fixtures.metric_names import METRIC_NAMES

OTHER_PREFIXES = ("python_", "process_", "vllm")


async def exposition(antares: Live) -> str:
    return (await antares.http.get("/metrics")).text


async def send_varied_requests(antares: Live) -> None:
    """Send requests that finish, are rejected, are invalid, and disconnect."""
    await antares.ask(x_slo_report="1")
    await antares.ask(chat(stream=True, n=2))
    await antares.ask(x_slo_ttft_ms="1")
    await antares.ask(chat(max_tokens=10**6))
    await antares.hang_up_after(1)
    await eventually(antares.is_idle)


async def test_metric_names_list_exactly_the_exported_metrics(antares: Live) -> None:
    await send_varied_requests(antares)
    exported = set()
    for family in text_string_to_metric_families(await exposition(antares)):
        if not family.name.startswith(OTHER_PREFIXES) and not family.name.endswith("_created"):
            exported.add(f"{family.name}_total" if family.type == "counter" else family.name)
    assert exported == METRIC_NAMES | METRIC_ALIASES.keys()
    assert all(name.startswith("antares_") for name in METRIC_NAMES)
    units = (
        "_seconds",
        "_tokens",
        "_total",
        "_ratio",
        "_requests",
        "_connections",
        "_bytes",
        "_sequences",
        "_up",
        "_starting",
        "_open",
        "_circuit",
        "_coefficient",
        "_r2",
        "_per_second",
        "_replicas",
    )
    assert all(name.endswith(units) for name in METRIC_NAMES)


async def test_old_metric_names_have_the_values_of_the_new_ones() -> None:
    async with live(shadow=["fcfs"]) as antares:
        antares.engine.state.gate.best_effort_preemptions = 3
        families = {f.name: f for f in antares.gateway.metrics.registry.collect()}
    for old, new in METRIC_ALIASES.items():
        assert new in METRIC_NAMES
        deprecated, current = families[old.removesuffix("_total")], families[new.removesuffix("_total")]
        assert deprecated.documentation == f"Deprecated: use {new}; removed in 0.3."
        assert current.samples
        assert deprecated.samples == [sample._replace(name=old) for sample in current.samples]


def test_metric_names_exclude_old_names() -> None:
    assert not METRIC_ALIASES.keys() & METRIC_NAMES


async def test_labels_never_hold_values_that_a_client_sent(antares: Live) -> None:
    await send_varied_requests(antares)
    before = set(re.findall(r"^antares_\S+(?= )", await exposition(antares), re.MULTILINE))
    for i in range(20):
        headers = {"x_request_id": f"id-{i}", "x_slo_class": f"class-{i}" if i % 2 else "chat"}
        await antares.ask(chat(model=f"model-{i}", user=f"user-{i}"), **headers)
        await antares.http.get(f"/v1/route-{i}")
    text = await exposition(antares)
    assert not re.search(r"(id|model|user|class|route)-\d", text)
    assert len(set(re.findall(r"^antares_\S+(?= )", text, re.MULTILINE)) - before) < 12


async def test_disconnect_on_a_forwarded_route_counts_as_499(antares: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    called = asyncio.Event()

    async def wait_for_disconnect(scope: Scope, receive: Receive, send: Send) -> None:
        called.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    monkeypatch.setattr(SimulatedEngine, "app", property(lambda engine: wait_for_disconnect))
    call = asyncio.create_task(antares.ask({"input": "hi"}, path="/v1/embeddings"))
    await called.wait()
    call.cancel()
    await eventually(lambda: 'route="/v1/embeddings",status="499"' in antares.gateway.metrics.exposition().decode())


async def test_adherence_counts_rejected_requests(antares: Live) -> None:
    await antares.ask()
    for _ in range(3):
        await antares.ask(x_slo_ttft_ms="1")
    text = await exposition(antares)
    accepted = sum(float(v) for v in re.findall(r"^antares_requests_total\{.*\} (\S+)$", text, re.MULTILINE))
    attained = sum(float(v) for v in re.findall(r"^antares_requests_attained_total\{.*\} (\S+)$", text, re.MULTILINE))
    assert (accepted, attained) == (4, 1)
    status = (await antares.http.get("/status")).json()
    assert status["classes"]["chat"]["adherence"] == 0.25
    assert status["ledger"] == {
        "accepted": 4, "open": 0, "attained": 1, "finished": 1, "rejected": 3, "failed": 0, "cancelled": 0,
    }  # fmt: skip


async def test_finished_request_counts_in_every_histogram_and_token_counter(antares: Live) -> None:
    await antares.ask(chat("one two three"))
    text = await exposition(antares)
    for name in ("ttft", "tpot", "e2e", "queue"):
        assert re.search(rf"antares_{name}_seconds_count\{{engine=.*\}} 1\.0", text), name
    assert re.search(r'antares_prompt_tokens_total\{.*tenant="anonymous"\} 3\.0', text)
    assert re.search(r'antares_output_tokens_total\{.*tenant="anonymous"\} 8\.0', text)


async def test_gauges_show_waiting_and_running_requests() -> None:
    async with live(fast_engine(times=StepTimes(d=0.02), max_num_seqs=1)) as antares:
        calls = [asyncio.create_task(antares.ask(x_slo_class="free")) for _ in range(3)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 2)
        text = await exposition(antares)
        assert 'antares_waiting_requests{engine="simulated",slo_class="free"} 2.0' in text
        assert 'antares_running_requests{engine="simulated",slo_class="free"} 1.0' in text
        assert "antares_ledger_open 3.0" in text
        free = (await antares.http.get("/status")).json()["classes"]["free"]
        assert (free["waiting"], free["running"]) == (2, 1)
        await asyncio.gather(*calls)


async def test_gateway_serves_dashboard_and_openapi(antares: Live) -> None:
    assert "<html" in (await antares.http.get("/dashboard")).text
    assert (await antares.http.get("/openapi.json")).status_code == 200
    assert (await antares.http.get("/nothing-here")).status_code == 404


SECRET = "xyzzy-plugh-42"


async def test_prompt_and_completion_text_appears_only_in_responses(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Send a marker through every way in which a request can end."""
    caplog.set_level(logging.DEBUG)
    classes = {**CLASSES, "full": {"max_waiting": 1}}
    async with live(fast_engine(times=StepTimes(d=5e-3), restart_s=0.05), classes=classes) as antares:
        outputs: list[str] = []
        for path, body, headers in [
            (CHAT, chat(SECRET), {"x_slo_ttft_ms": "1"}),
            (CHAT, chat(SECRET), {"x_slo_tpot_ms": "0.01"}),
            (CHAT, chat(SECRET, n=SECRET), {}),
            (CHAT, chat(SECRET, max_tokens=10**6), {}),
            (CHAT, {"messages": SECRET}, {}),
            (CHAT, {"messages": [SECRET]}, {}),
            (TEXT, {"prompt": {SECRET: SECRET}}, {}),
            (TEXT, {"prompt": SECRET, "stream": SECRET}, {}),
            (CHAT, [SECRET], {}),
        ]:
            answer = await antares.ask(body, path, **headers)
            assert answer.status_code >= 400
            outputs.append(answer.text)
        outputs.append((await antares.http.post(CHAT, content=b'{"a": "' + SECRET.encode() + b'" "b"}')).text)
        await antares.hang_up_after(1, SECRET)
        outputs.append((await antares.ask(chat(SECRET), x_slo_report="1")).text)
        await eventually(antares.is_idle)
        for stream in (False, True):
            call = asyncio.create_task(antares.ask(chat(SECRET, stream=stream)))
            await eventually(lambda: antares.engine.state.engine_running)
            antares.engine.crash()
            outputs.append((await call).text)
            await eventually(lambda: antares.engine.state.alive)

        async def broken(scope: object, receive: object, send: object) -> None:
            raise RuntimeError(f"the prompt was {SECRET}")

        monkeypatch.setattr(SimulatedEngine, "app", property(lambda engine: broken))
        outputs.append((await antares.ask(chat(SECRET))).text)
        outputs += [(await antares.http.get(path)).text for path in ("/metrics", "/status")]
        assert SECRET not in "\n".join(outputs)
        records = [
            record for record in caplog.records if not record.name.startswith(("httpcore", "httpx", "hypothesis"))
        ]
        assert SECRET not in "\n".join(record.getMessage() for record in records)
        assert set(antares.outcomes.values()) & {0} == set()


OPEN_METRICS = {"accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"}


async def test_openmetrics_has_an_exemplar_for_a_late_request_and_ends_once() -> None:
    engine = fast_engine(times=StepTimes(b=1e-6, d=3e-2, alpha=1e-6))
    engine.state.step_time.start_over(StepTimes(b=1e-6, d=1e-3, alpha=1e-6))
    engine.state.step_time.learn = False
    async with live(engine) as antares:
        await antares.ask(chat(stream=True, max_tokens=4), x_request_id="in-time")
        await antares.ask(chat(stream=True, max_tokens=4), x_request_id="late", x_slo_tpot_ms="10")
        answer = await antares.http.get("/metrics", headers=OPEN_METRICS)
        late = (await antares.http.get("/v1/requests/late")).json()["id"]

    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")
    assert answer.text.count("# EOF") == 1
    exemplars = {
        (sample.name, sample.exemplar.labels["request_id"])
        for family in openmetrics_families(answer.text)
        for sample in family.samples
        if sample.exemplar
    }
    assert exemplars == {
        (f"antares_{name}_seconds_bucket", late) for name in ("queue", "ttft", "tpot", "e2e")
    }  # fmt: skip


async def test_plain_text_is_the_default_exposition(antares: Live) -> None:
    answer = await antares.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# EOF" not in answer.text


async def test_predictions_are_compared_with_what_was_measured() -> None:
    engine = fast_engine(times=StepTimes(b=1e-6, d=3e-2, alpha=1e-6))
    engine.state.step_time.start_over(StepTimes(b=1e-6, d=1e-2, alpha=1e-6))
    engine.state.step_time.learn = False
    async with live(engine) as antares:
        await antares.ask(chat(stream=True, max_tokens=8))
        text = await exposition(antares)

    def value(name: str) -> float:
        return float(re.search(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    assert value("antares_ttft_prediction_ratio_count") == 1
    assert value("antares_ttft_prediction_ratio_sum") > 1
    # Steps take three times as long as predicted.
    assert value("antares_tpot_prediction_ratio_count") == 1
    assert value("antares_tpot_prediction_ratio_sum") > 2


async def test_step_times_are_compared_with_the_model(antares: Live) -> None:
    for _ in range(4):
        await antares.ask(chat(max_tokens=40, ignore_eos=True))
    model = antares.engine.state.step_time
    text = await exposition(antares)

    assert model.actual_s > 0
    assert f'antares_step_seconds_total{{engine="simulated",kind="actual"}} {model.actual_s}' in text
    assert f'antares_step_seconds_total{{engine="simulated",kind="predicted"}} {model.predicted_s}' in text
    assert f'antares_step_error_seconds_total{{engine="simulated"}} {model.error_s}' in text


async def test_drafts_are_counted_by_kind(antares: Live) -> None:
    for _ in range(3):
        antares.engine.state.acceptance.observe(StepReport(4, 0, 100.0, 0.02, 4, 12, 5, offered_requests=4))
    antares.engine.state.acceptance.observe(StepReport(4, 0, 100.0, 0.02))
    text = await exposition(antares)
    assert 'antares_draft_tokens_total{engine="simulated",kind="verified"} 36.0' in text
    assert 'antares_draft_tokens_total{engine="simulated",kind="accepted"} 15.0' in text
