"""Reload of engines, policies, shadow policies and limits under load: no request is lost."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from engine_adapter.engine import EngineEvents, EngineStartError
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.step_time.linear_forms import StepTimes
from gateway import top
from gateway.engines import START_AGAIN_S
from tests.fixtures.live_gateway import CHAT, Live, chat, fast_engine, gateway_config, live
from tests.fixtures.live_server import HANG_S, eventually, serve
from tests.fixtures.ports import free_port
from tests.fixtures.served_process import served

pytestmark = pytest.mark.process


def engine(name: str = "simulated", **changes: Any) -> dict[str, Any]:
    return {"kind": "simulated", "name": name, "step_times": {"d": 0.01}, **changes}


def names(antares: Live) -> list[str]:
    return [queue.engine.name for queue in antares.gateway.engine_queues]


@contextlib.asynccontextmanager
async def streams(antares: Live, count: int, max_tokens: int = 60, model: str = "simulated") -> AsyncIterator[None]:
    """Open ``count`` streams, and check that each ends as it should when the block ends."""
    body = {**chat(stream=True, max_tokens=max_tokens, ignore_eos=True), "model": model}
    tasks = [asyncio.create_task(antares.ask(body, x_slo_class="free")) for _ in range(count)]
    await eventually(lambda: antares.gateway.ledger.open_count == count)
    yield
    answers = await asyncio.gather(*tasks)
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    assert all('"error"' not in answer.text for answer in answers)


async def test_engine_that_is_added_serves_at_once() -> None:
    async with live() as antares:
        done = antares.gateway.reload(gateway_config(engines=[engine(), engine("b", model="second")]))
        assert done.changed == ["engines"]
        await eventually(lambda: names(antares) == ["simulated", "b"])
        answer = await antares.ask({**chat(), "model": "second"})
        assert answer.status_code == 200
        assert 'antares_engine_up{engine="b"} 1.0' in antares.gateway.metrics.exposition().decode()


async def test_engine_that_is_added_and_not_up_is_shown_until_it_serves() -> None:
    port = free_port()
    added = {"kind": "http", "name": "gpu", "base_url": f"http://127.0.0.1:{port}"}
    async with live() as antares:
        antares.gateway.reload(gateway_config(engines=[engine(), added]))
        await eventually(lambda: "connection refused" in antares.gateway.status.document()["starting"][0]["why"])
        assert antares.gateway.status.document()["starting"][0]["name"] == "gpu"
        metrics = antares.gateway.metrics.exposition().decode()
        assert 'antares_engine_starting{engine="gpu"} 1.0' in metrics
        assert 'antares_engine_up{engine="gpu"}' not in metrics
        shown = io.StringIO()
        await top.run(antares.url, None, True, Console(width=120, file=shown))
        assert re.search(r"gpu +starting", shown.getvalue())
        antares.gateway.reload(gateway_config(engines=[engine()]))
        assert antares.gateway.status.document()["starting"] == []
        assert "antares_engine_starting{" not in antares.gateway.metrics.exposition().decode()


async def test_removed_engine_finishes_its_requests_and_gets_no_new_ones() -> None:
    slow = fast_engine(name="a", model="m", times=StepTimes(d=0.02))
    other = fast_engine(name="b", model="m", times=StepTimes(d=0.02))
    config = [engine("a", model="m"), engine("b", model="m")]
    async with live(slow, more_engines=[other], engines=config) as antares:
        async with streams(antares, 12, model="m"):
            await eventually(lambda: slow.state.engine_running > 3)
            done = antares.gateway.reload(gateway_config(engines=config[1:]))
            assert done.leaving == ["a"]
            assert names(antares) == ["b"]
            assert (await antares.ask({**chat(), "model": "m"})).status_code == 200
            assert slow.state.alive
        await eventually(lambda: not slow.state.alive)
        await eventually(lambda: antares.gateway.engines.leaving == [])


async def test_waiting_requests_of_a_removed_engine_go_to_another_one() -> None:
    slow = fast_engine(name="a", times=StepTimes(d=0.02), max_num_seqs=1)
    other = fast_engine(name="b", times=StepTimes(d=0.01), max_num_seqs=4)
    config = [engine("a"), engine("b")]
    async with live(slow, more_engines=[other], engines=config) as antares, streams(antares, 12, 40):
        first = antares.gateway.engine_queues[0]
        await eventually(lambda: first.waiting and first.running)
        antares.gateway.reload(gateway_config(engines=config[1:]))
        assert len(first.waiting) == 0
        assert len(first.running) == 1


async def test_model_that_vanishes_is_still_served_to_those_who_wait() -> None:
    slow = fast_engine(name="a", model="old", times=StepTimes(d=0.01), max_num_seqs=1)
    config = [engine("a", model="old"), engine("b", model="new")]
    async with live(slow, more_engines=[fast_engine(name="b", model="new")], engines=config) as antares:
        body = {**chat(max_tokens=20, ignore_eos=True), "model": "old"}
        tasks = [asyncio.create_task(antares.ask(body, x_slo_class="free")) for _ in range(3)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 2)
        antares.gateway.reload(gateway_config(engines=config[1:]))
        assert (await antares.ask(body)).json()["error"]["code"] == "model_not_found"
        assert [(await task).status_code for task in tasks] == [200] * 3


async def test_requests_beyond_the_drain_time_end_with_an_error_that_names_the_removal() -> None:
    slow = fast_engine(name="a", times=StepTimes(d=0.02))
    config = [engine("a"), engine("b", model="other")]
    server = {"drain_s": 0.2}
    async with live(
        slow, more_engines=[fast_engine(name="b", model="other")], engines=config, server=server
    ) as antares:
        body = chat(stream=True, max_tokens=4000, ignore_eos=True)
        task = asyncio.create_task(antares.ask({**body, "model": "simulated"}))
        await eventually(lambda: slow.state.engine_running == 1)
        antares.gateway.reload(gateway_config(engines=config[1:], server=server))
        text = (await task).text
        assert '"code":"draining"' in text
        assert "was removed" in text
        assert antares.outcomes["failed"] == 1


async def test_changed_engine_is_replaced_while_its_streams_go_on() -> None:
    old = fast_engine(times=StepTimes(d=0.02))
    async with live(old) as antares:
        async with streams(antares, 8):
            await eventually(lambda: old.state.engine_running > 0)
            antares.gateway.reload(gateway_config(engines=[engine(max_num_seqs=3)]))
            await eventually(lambda: antares.gateway.engine_queues[0].engine is not old)
            assert antares.gateway.engine_queues[0].engine.state.max_num_seqs == 3
            assert antares.gateway.metrics.exposition().decode().count('antares_engine_up{engine="simulated"}') == 1
        await eventually(lambda: not old.state.alive)


async def test_changed_address_of_a_server_moves_requests_and_keeps_streams() -> None:
    old, new = fast_engine(times=StepTimes(d=0.02)), fast_engine()
    for upstream in (old, new):
        await upstream.start(EngineEvents())
    async with serve(old.app) as first, serve(new.app) as second:
        listed = [{"kind": "http", "name": "gpu", "base_url": first}]
        async with live(HttpEngine("gpu", first), engines=listed) as antares:
            async with streams(antares, 8):
                await eventually(lambda: old.state.engine_running == 8)
                antares.gateway.reload(gateway_config(engines=[{**listed[0], "base_url": second}]))
                await eventually(lambda: antares.gateway.engine_queues[0].engine.state.alive)
                await eventually(lambda: antares.gateway.engines.leaving == ["gpu"])
                assert (await antares.ask()).status_code == 200
                assert old.state.engine_running == 8
            await eventually(lambda: antares.gateway.engines.leaving == [])
    for upstream in (old, new):
        await upstream.stop()


async def test_passed_through_request_finishes_on_a_removed_engine() -> None:
    slow = fast_engine(name="a")
    config = [engine("a"), engine("b", model="other")]
    async with live(slow, more_engines=[fast_engine(name="b", model="other")], engines=config) as antares:
        goes_on = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await goes_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        slow.stub = app
        task = asyncio.create_task(antares.ask({"model": "simulated", "input": "a"}, "/v1/embeddings"))
        await eventually(lambda: antares.gateway.engine_queues[0].calls == 1)
        antares.gateway.reload(gateway_config(engines=config[1:]))
        await asyncio.sleep(0.2)
        assert antares.gateway.engines.leaving == ["a"]
        goes_on.set()
        assert (await task).status_code == 200
        await eventually(lambda: antares.gateway.engines.leaving == [])


async def test_gateway_that_stops_during_a_reload_answers_draining() -> None:
    slow = fast_engine(times=StepTimes(d=0.02), max_num_seqs=1)
    async with live(slow) as antares:
        body = chat(max_tokens=4000, ignore_eos=True)
        tasks = [asyncio.create_task(antares.ask(body, x_slo_class="free")) for _ in range(3)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 2)
        new = {"kind": "http", "name": "new", "base_url": f"http://127.0.0.1:{free_port()}"}
        antares.gateway.reload(gateway_config(engines=[new]))
        antares.gateway.reload(gateway_config(engines=[engine("b", model="other")]))
        await eventually(lambda: antares.gateway.engines.leaving)
        await antares.gateway.stop()
        assert [(await task).json()["error"]["code"] for task in tasks] == ["draining"] * 3
        assert antares.gateway.ledger.open_count == 0


async def test_removed_engine_serves_until_the_added_one_is_up() -> None:
    async with live() as antares:
        address = f"http://127.0.0.1:{free_port()}"
        new = {"kind": "http", "name": "new", "base_url": address}
        done = antares.gateway.reload(gateway_config(engines=[new]))
        assert (done.starting, done.leaving) == (["new"], [])
        await asyncio.sleep(0.3)
        assert names(antares) == ["simulated"]
        assert (await antares.ask()).status_code == 200
        # A later reload that takes it back ends the attempt.
        antares.gateway.reload(gateway_config(engines=[{"kind": "simulated"}]))
        await eventually(lambda: antares.gateway.engines.starting == antares.gateway.engines.leaving == [])
        assert names(antares) == ["simulated"]


async def test_engine_that_does_not_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.engines.START_AGAIN_S", (0.05, *START_AGAIN_S))
    async with live() as antares:
        attempts = 0

        def flaky(config: Any) -> Any:
            nonlocal attempts
            attempts += 1
            made = fast_engine(name=config.name)
            if attempts < 2:

                async def fails(events: Any) -> None:
                    raise EngineStartError("no memory")

                made.start = fails  # type: ignore[method-assign]
            return made

        monkeypatch.setattr(antares.gateway.engines, "_build", flaky)
        antares.gateway.reload(gateway_config(engines=[engine(), engine("b")]))
        await eventually(lambda: "b" in names(antares))
        assert attempts >= 2


async def test_engines_that_cannot_coexist_are_replaced_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.engines._excludes", lambda one, other: True)
    old = fast_engine(times=StepTimes(d=0.02))
    async with live(old) as antares:
        started_after: list[bool] = []
        build = antares.gateway.engines._build

        def recording(config: Any) -> Any:
            made = build(config)
            start = made.start

            async def recorded(events: Any) -> None:
                started_after.append(not old.state.alive)
                await start(events)

            made.start = recorded  # type: ignore[method-assign]
            return made

        monkeypatch.setattr(antares.gateway.engines, "_build", recording)
        async with streams(antares, 4, 20):
            await eventually(lambda: old.state.engine_running > 0)
            done = antares.gateway.reload(gateway_config(engines=[engine(max_num_seqs=5)]))
            assert (done.starting, done.leaving) == (["simulated"], ["simulated"])
            # The new one takes the place of the old one, so that requests wait for it.
            later = asyncio.create_task(antares.ask(x_slo_class="free"))
        assert (await later).status_code == 200
        assert started_after == [True]


async def test_policy_change_keeps_what_waits_and_runs() -> None:
    slow = fast_engine(times=StepTimes(d=0.01), max_num_seqs=2)
    async with live(slow) as antares, streams(antares, 10, 30):
        queue = antares.gateway.engine_queues[0]
        await eventually(lambda: len(queue.running) == 2)
        for name in ("fcfs", "scorpio", "annealing", "s3", "mooncake", "slack"):
            waiting, running = set(queue.waiting), dict(queue.running)
            done = antares.gateway.reload(gateway_config(policy={"name": name}))
            assert done.changed == ["policy"]
            assert queue.policy.name == name
            assert set(queue.waiting) == waiting
            assert dict(queue.running) == running
            await asyncio.sleep(0.03)


async def test_policy_change_sorts_the_queue_again() -> None:
    slow = fast_engine(times=StepTimes(d=0.01), max_num_seqs=1)
    async with live(slow) as antares:
        queue = antares.gateway.engine_queues[0]
        async with streams(antares, 1, 40):
            tasks = []
            for ttft_ms in ("9000", "5000", "7000"):
                tasks.append(asyncio.create_task(antares.ask(chat(max_tokens=1), x_slo_ttft_ms=ttft_ms)))
                await eventually(lambda: len(queue.waiting) == len(tasks))
            assert [request.slo.ttft_s for request in queue.waiting] == [5, 7, 9]
            antares.gateway.reload(gateway_config(policy={"name": "fcfs"}))
            assert [request.slo.ttft_s for request in queue.waiting] == [9, 5, 7]
        assert [(await task).status_code for task in tasks] == [200] * 3


async def test_shadow_policies_change_and_unchanged_ones_go_on() -> None:
    async with live(shadow=["fcfs", "s3"]) as antares:
        queue = antares.gateway.engine_queues[0]
        kept = queue.shadows.all[0]
        assert (await antares.ask()).status_code == 200
        await eventually(lambda: kept.updates > 0)
        antares.gateway.reload(gateway_config(shadow=["fcfs", {"name": "scorpio", "label": "s3"}]))
        assert queue.shadows.all[0] is kept
        assert [shadow.name for shadow in queue.shadows.all] == ["fcfs", "s3"]
        before = queue.shadows.all[1].updates
        assert (await antares.ask()).status_code == 200
        await eventually(lambda: queue.shadows.all[1].updates > before)
        antares.gateway.reload(gateway_config())
        assert queue.shadows.all == ()
        assert (await antares.ask()).status_code == 200


async def test_limits_change_for_later_requests() -> None:
    async with live() as antares:
        antares.gateway.reload(gateway_config(server={"max_body_bytes": 1024, "pass_through_routes": ["/v1/foo"]}))
        assert (await antares.ask(chat("a" * 2000))).status_code == 413
        antares.echo_bodies()
        assert (await antares.ask({"a": 1}, "/v1/foo")).status_code == 200
        antares.gateway.reload(gateway_config(server={"cors": {"allow_origins": ["http://a.example"]}}))
        answer = await antares.ask(origin="http://a.example")
        assert answer.headers["access-control-allow-origin"] == "http://a.example"
        assert (await antares.ask({"a": 1}, "/v1/foo")).status_code == 404


BASE = """\
server: {{port: 0, drain_s: 20, max_open_requests: {limit}}}
engines: [{engines}]
policy: {{name: {policy}}}
predictor: {{enabled: false}}
default_class: chat
classes: {{chat: {{ttft_ms: {ttft}}}, free: {{}}}}
"""


def file_text(engines: str, policy: str = "slack", ttft: int = 9000, limit: int = 1000) -> str:
    listed = ", ".join(f"{{kind: simulated, name: {name}, step_times: {{d: 0.15}}}}" for name in engines)
    return BASE.format(engines=listed, policy=policy, ttft=ttft, limit=limit)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGHUP")
async def test_reloads_drop_none_of_200_streams(tmp_path: Path) -> None:
    file = tmp_path / "antares.yaml"
    async with served(tmp_path, file_text("ab")) as (process, http):
        client = httpx.AsyncClient(
            base_url=http.base_url, timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None), verify=False
        )
        async with client:
            body = chat(stream=True, max_tokens=60, ignore_eos=True)
            tasks = [
                asyncio.create_task(client.post(CHAT, json=body, headers={"x-slo-class": "free"})) for _ in range(200)
            ]
            async with asyncio.timeout(HANG_S):
                while "antares_ledger_open 200.0" not in (await http.get("/metrics")).text:
                    await asyncio.sleep(0.05)
            changes = [
                file_text("abc"),
                file_text("abc", policy="fcfs"),
                file_text("bc", policy="fcfs", ttft=8000),
                "engines: [",
                file_text("bcd", policy="scorpio", ttft=8000, limit=500),
                file_text("cd", policy="slack", ttft=7000, limit=400),
            ]
            for text in changes:
                file.write_text(text)
                answer = await http.post("/reload")
                assert answer.status_code == (422 if text == "engines: [" else 200)
            # A storm, while the streams go on.
            for _ in range(100):
                process.send_signal(signal.SIGHUP)
                # NOTE: the event loop is busy with 200 streams, and would stretch the storm to seconds.
                time.sleep(0.002)  # noqa: ASYNC251
            assert not all(task.done() for task in tasks)
            answers = await asyncio.gather(*tasks)
            assert all(a.status_code == 200 and a.text.endswith("data: [DONE]\n\n") for a in answers)
            assert all('"error"' not in a.text for a in answers)
            status = (await http.get("/status")).json()
            assert [engine["name"] for engine in status["engines"]] == ["c", "d"]
            assert status["classes"]["chat"]["slo_ttft_ms"] == 7000
            assert (status["ledger"]["finished"], status["ledger"]["open"]) == (200, 0)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = (await process.stderr.read()).decode()
        assert await process.wait() == 0
        assert "Traceback" not in log
        assert "engine a has left" in log
        assert log.count("changed: nothing") <= 10
