"""The live feed of the dashboard: its content, and viewers that are many, slow or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.observability import live as feed
from gateway.observability.live import EVENTS_PATH, MAX_VIEWERS
from tests.fixtures.live_gateway import Live, chat, fast_engine, live
from tests.fixtures.live_server import HANG_S, eventually

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.05)


@asynccontextmanager
async def watching(antares: Live) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
    """The events of a new viewer: name and document."""
    async with antares.http.stream("GET", EVENTS_PATH) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"

        async def events() -> AsyncIterator[tuple[str, Any]]:
            name = ""
            async for line in response.aiter_lines():
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    yield name, json.loads(value)

        yield events()


async def snapshot(antares: Live) -> dict[str, Any]:
    async with watching(antares) as events:
        await anext(events)
        return (await anext(events))[1]


async def test_viewer_gets_the_history_then_snapshots(antares: Live) -> None:
    async with watching(antares) as events:
        names = [(await anext(events))[0] for _ in range(4)]
    assert names == ["history", "snapshot", "snapshot", "snapshot"]


async def test_snapshot_has_what_the_page_shows(antares: Live) -> None:
    await antares.ask()
    await antares.ask(x_slo_ttft_ms="1")
    now = await snapshot(antares)
    assert now["windows"]["1m"]["total"]["ended"] == 2
    assert now["windows"]["1m"]["reasons"][0]["reason"] == "ttft_unattainable"
    assert now["classes"]["chat"]["adherence"] == 0.5
    assert (now["policy"], now["predictor"], now["draining"]) == ("slack", "off", False)
    assert now["engines"][0]["alive"] is True
    assert now["tenants"] == {}
    model = now["step_times"]["simulated"]
    assert [curve["context"] for curve in model["curves"]] == [256, 1024, 4096]
    assert all(time_ms > 0 for curve in model["curves"] for _, time_ms in curve["points"])


async def test_snapshot_shows_queue_and_running_set() -> None:
    async with live(fast_engine(times=StepTimes(d=0.05), max_num_seqs=1)) as antares:
        calls = [asyncio.create_task(antares.ask(x_slo_class="free")) for _ in range(3)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 2)
        now = await snapshot(antares)
        await asyncio.gather(*calls)
    assert now["tenants"] == {"anonymous": {"waiting": 2, "running": 1}}
    assert now["sample"][1]["free"][3:] == [2, 1]
    assert now["sample"][2] == {"simulated": [2, 1]}


async def test_points_compare_predicted_and_achieved(antares: Live) -> None:
    for _ in range(3):
        await antares.ask()
    async with watching(antares) as events:
        points = []
        while len(points) < 3:
            _, document = await anext(events)
            points += document["points"]
    _, slo_class, predicted_ms, achieved_ms, pace_ms, tpot_ms, attained = points[0]
    assert (slo_class, attained, pace_ms) == ("chat", True, 1000.0)
    assert predicted_ms > 0
    assert achieved_ms > 0
    assert tpot_ms > 0


async def test_snapshot_thins_out_many_points(antares: Live) -> None:
    async with watching(antares) as events:
        await anext(events)
        await anext(events)
        await asyncio.gather(*(antares.ask() for _ in range(200)))
        points: list[Any] = []
        async with asyncio.timeout(HANG_S):
            while not points:
                points = (await anext(events))[1]["points"]
    assert len(points) <= 20
    assert [point[0] for point in points] == sorted(point[0] for point in points)


async def test_snapshot_is_computed_once_for_all_viewers(antares: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 0
    document = antares.gateway.status.document

    def counted() -> dict[str, Any]:
        nonlocal computed
        computed += 1
        return document()

    monkeypatch.setattr(type(antares.gateway.status), "document", lambda status: counted())
    async with watching(antares) as first, watching(antares) as second:
        seen = []
        for events in (first, second):
            await anext(events)
            seen.append([(await anext(events))[1]["at"] for _ in range(3)])
    assert computed <= len(set(seen[0]) | set(seen[1])) + 6


async def test_history_grows_and_nothing_else_is_computed_without_viewers(
    antares: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(antares.gateway.status), "document", lambda status: pytest.fail("nobody watches"))
    antares.gateway.live.start()
    await asyncio.sleep(0.6)
    monkeypatch.undo()
    async with watching(antares) as events:
        name, history = await anext(events)
    assert name == "history"
    assert len(history["samples"]) >= 3


async def test_too_many_viewers_get_503_and_a_place_when_one_leaves(antares: Live) -> None:
    async with httpx.AsyncClient(base_url=antares.url, timeout=HANG_S, trust_env=False) as http:
        responses = [await http.send(http.build_request("GET", EVENTS_PATH), stream=True) for _ in range(MAX_VIEWERS)]
        await eventually(lambda: antares.gateway.live._viewers == MAX_VIEWERS)
        denied = await antares.http.get(EVENTS_PATH)
        assert (denied.status_code, denied.headers["retry-after"]) == (503, "5")
        await responses[0].aclose()
        async with asyncio.timeout(HANG_S):
            while (await antares.http.head(EVENTS_PATH)).status_code != 200:
                await asyncio.sleep(0.05)
        for response in responses:
            await response.aclose()


async def test_head_opens_no_stream(antares: Live) -> None:
    response = await antares.http.head(EVENTS_PATH)
    assert response.status_code == 200
    assert antares.gateway.live._viewers == 0


async def test_viewer_that_reads_nothing_is_disconnected(antares: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SEND_TIMEOUT_S", 0.2)
    stalled = asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            stalled.set()
            await asyncio.sleep(60)

    async def receive() -> Any:
        await asyncio.sleep(60)

    async with asyncio.timeout(30):
        await antares.gateway.live.response()({"type": "http"}, receive, send)  # type: ignore[arg-type]
    assert stalled.is_set()
    assert antares.gateway.live._viewers == 0


async def test_slow_viewer_skips_snapshots_and_delays_no_other(antares: Live) -> None:
    taken: list[bytes] = []
    goes_on = asyncio.Event()

    async def slow(message: Any) -> None:
        if message.get("body"):
            taken.append(message["body"])
            if len(taken) > 1:
                await goes_on.wait()

    async def receive() -> Any:
        await asyncio.sleep(60)

    watcher = asyncio.ensure_future(antares.gateway.live.response()({"type": "http"}, receive, slow))  # type: ignore[arg-type]
    async with watching(antares) as events, asyncio.timeout(HANG_S):
        await eventually(lambda: len(taken) == 2)
        for _ in range(20):
            await anext(events)
        goes_on.set()
        await eventually(lambda: len(taken) == 3)
    skipped_to = json.loads(taken[2].split(b"data: ")[1])["at"]
    assert skipped_to > json.loads(taken[1].split(b"data: ")[1])["at"] + 10 * feed.INTERVAL_S
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)


async def test_stop_ends_the_streams_of_viewers(antares: Live) -> None:
    async with watching(antares) as events:
        await anext(events)
        await antares.gateway.live.stop()
        async with asyncio.timeout(HANG_S):
            assert [name async for name, _ in events if name != "snapshot"] == []
    assert (await antares.http.get(EVENTS_PATH)).status_code == 503


async def test_feed_survives_an_error_in_one_snapshot(antares: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watching(antares) as events:
        await anext(events)
        await anext(events)
        with monkeypatch.context() as patch:
            patch.setattr(type(antares.gateway.status), "document", lambda status: 1 / 0)
            await asyncio.sleep(0.2)
        async with asyncio.timeout(HANG_S):
            at = [(await anext(events))[1]["at"] for _ in range(5)]
    assert at == sorted(at)


async def test_feed_holds_no_text_of_requests(antares: Live) -> None:
    secret = "xyzzy-plugh-42"
    await antares.ask(chat(secret, user=secret), x_slo_ttft_ms="1")
    await antares.ask(chat(secret), x_request_id=secret)
    async with watching(antares) as events:
        text = json.dumps([await anext(events) for _ in range(3)])
    assert secret not in text
