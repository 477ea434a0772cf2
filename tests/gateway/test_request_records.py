"""`GET /v1/requests` and `antares explain`: why a request was rejected, late, moved or cancelled."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_adapter.engine import EngineLost, Receive, Scope, Send
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api.auth import hash_key
from gateway.cli import app
from gateway.observability.decisions import Decisions, RequestRecord
from gateway.observability.explanation import explain
from gateway.observability.ledger import Entry
from tests.fixtures.live_gateway import CHAT, AdmitNothing, Live, chat, fast_engine, live
from tests.fixtures.live_server import eventually
from tests.fixtures.policy_builders import make_request

CANARY = "xylophone-canary-7261"
ALICE, BOB = "alice-key-0123456789abcdef", "bob-key-0123456789abcdef"
KEYS = [
    {"sha256": hash_key(ALICE), "tenant": "alice"},
    {"sha256": hash_key(BOB), "tenant": "bob"},
]


async def record(antares: Live, request_id: str, **headers: str) -> dict[str, Any]:
    answer = await antares.http.get(f"/v1/requests/{request_id}", headers=headers)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def listed(antares: Live, query: str = "", **headers: str) -> list[str]:
    answer = await antares.http.get(f"/v1/requests{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    return [document["request_id"] for document in answer.json()["data"]]


async def test_record_of_a_finished_request_has_every_decision(antares: Live) -> None:
    answer = await antares.ask(chat(CANARY, stream=True, max_tokens=4), x_request_id="mine-1")
    assert answer.headers["x-request-id"] == "mine-1"

    found = await record(antares, "mine-1")

    assert (found["state"], found["outcome"], found["status"], found["attained"]) == ("ended", "finished", 200, True)
    assert found["slo"] == {
        "ttft_ms": 5000, "tpot_ms": 1000, "e2e_ms": None, "from_class": ["tpot", "ttft"], "kind": "paced",
        "waived": False, "pace_ms": 1000,
    }  # fmt: skip
    assert found["prompt"]["tokens"] > 1
    assert found["prompt"]["source"] in ("rendered", "estimated")
    assert found["output"]["tokens"] == 4
    assert found["output"]["prediction_source"] == "fallback"
    latency, timeline = found["latency"], found["timeline"]
    assert 0 <= latency["queue_ms"] <= latency["ttft_ms"] <= latency["e2e_ms"]
    assert latency["predicted_ttft_ms"] > 0
    assert latency["predicted_tpot_ms"] > 0
    assert timeline["received_ms"] <= timeline["predicting_ms"] <= timeline["predicted_ms"]
    assert timeline["first_token_ms"] <= timeline["ended_ms"]
    (attempt,) = found["attempts"]
    assert attempt["engine"] == found["engine"] == "simulated"
    assert attempt["placed_ms"] <= attempt["admitted_ms"]
    assert (attempt["waiting_requests"], attempt["ahead"], attempt["running_requests"]) == (0, 0, 0)
    assert abs(found["timeline"]["ended_ms"]) < 10_000
    # By the ledger's id too.
    assert (await record(antares, found["id"]))["request_id"] == "mine-1"
    assert "finished in time" in explain(found)


async def test_no_record_contains_text_of_the_request(antares: Live) -> None:
    await antares.ask(chat(CANARY), x_request_id="a")
    await antares.ask(chat(CANARY), x_request_id="b", x_slo_ttft_ms="0.001")

    everything = (await antares.http.get("/v1/requests")).text

    assert "xylophone" not in everything
    assert "xylophone" not in explain(await record(antares, "b"))


async def test_record_of_a_rejection_has_the_predicted_and_the_attainable_value(antares: Live) -> None:
    answer = await antares.ask(x_request_id="no", x_slo_ttft_ms="0.001")
    error = answer.json()["error"]

    found = await record(antares, "no")

    assert (found["outcome"], found["reason"], found["status"]) == ("rejected", "ttft_unattainable", 429)
    assert found["rejection"]["bound"] == "ttft"
    assert found["latency"]["queue_ms"] >= 0
    assert found["rejection"]["predicted_ms"] == pytest.approx(error["predicted_ms"], abs=0.06)
    assert found["rejection"]["attainable_ms"] == pytest.approx(error["attainable_ms"], abs=0.06)
    text = explain(found)
    assert "was rejected: its time to first token of 0.001 ms could not be met" in text
    assert f"Set x-slo-ttft-ms to {found['rejection']['attainable_ms']:.0f}" in text


async def test_record_of_a_late_request_names_the_bound_and_the_largest_part() -> None:
    # The model believes in steps of 1 ms, but they take 30.
    engine = fast_engine(times=StepTimes(b=1e-6, d=3e-2, alpha=1e-6))
    engine.state.step_time.start_over(StepTimes(b=1e-6, d=1e-3, alpha=1e-6))
    engine.state.step_time.learn = False
    async with live(engine) as antares:
        answer = await antares.ask(chat(stream=True, max_tokens=8), x_request_id="late", x_slo_tpot_ms="10")
        assert answer.status_code == 200

        found = await record(antares, "late")
        assert await listed(antares, "?outcome=late") == ["late"]

    assert (found["outcome"], found["attained"], found["violated"]) == ("finished", False, ["tpot"])
    text = explain(found)
    assert "finished, but missed its time per output token of 10 ms by" in text
    assert "Steps became longer after it" in text
    assert "decode of 8 tokens on simulated" in text


async def test_record_of_a_request_that_moved_names_both_engines() -> None:
    async def dying(scope: Scope, receive: Receive, send: Send) -> None:
        raise EngineLost

    bad = fast_engine(name="bad")
    bad.stub = dying
    async with live(bad, more_engines=[fast_engine(name="good")]) as antares:
        answer = await antares.ask(x_request_id="moved")
        assert answer.status_code == 200

        found = await record(antares, "moved")

    assert [(a["engine"], a["end"]) for a in found["attempts"]] == [("bad", "lost"), ("good", None)]
    assert found["engine"] == "good"
    text = explain(found)
    assert "bad: placed after" in text
    assert "the engine died or the connection to it broke" in text


async def test_record_of_a_failed_request_names_the_engine() -> None:
    async def dying(scope: Scope, receive: Receive, send: Send) -> None:
        raise EngineLost

    engine = fast_engine()
    engine.stub = dying
    async with live(engine) as antares:
        assert (await antares.ask(x_request_id="lost")).status_code == 503
        found = await record(antares, "lost")

    assert (found["outcome"], found["reason"], found["attempts"][-1]["end"]) == ("failed", "engine_lost", "lost")
    assert "Check engine simulated" in explain(found)


async def test_record_of_a_cancelled_request_says_what_it_waited_for(antares: Live) -> None:
    antares.gateway.engine_queues[0].admission.policy = _nothing()
    asking = asyncio.create_task(antares.http.post(CHAT, json=chat(), headers={"x-request-id": "gone"}))
    await eventually(lambda: antares.gateway.engine_queues[0].waiting)
    await asyncio.sleep(0.3)
    asking.cancel()
    await eventually(antares.is_idle)

    found = await record(antares, "gone")

    assert (found["outcome"], found["reason"], found["status"]) == ("cancelled", "client_left", 499)
    text = explain(found)
    assert "the client disconnected" in text
    assert "most of its time was waiting for admission" in text


async def test_open_request_is_found_before_it_ends(antares: Live) -> None:
    antares.gateway.engine_queues[0].admission.policy = _nothing()
    asking = asyncio.create_task(antares.http.post(CHAT, json=chat(), headers={"x-request-id": "open"}))
    await eventually(lambda: antares.gateway.engine_queues[0].waiting)

    found = await record(antares, "open")
    assert (found["state"], found["outcome"]) == ("waiting", None)
    assert "is waiting for admission" in explain(found)
    assert await listed(antares, "?outcome=open") == ["open"]
    assert await listed(antares, "?outcome=finished") == []

    asking.cancel()
    await eventually(antares.is_idle)


def _nothing() -> Any:
    policy = AdmitNothing()
    policy.order = lambda request: (request.arrival_s,)  # type: ignore[attr-defined]
    return policy


async def test_list_is_newest_first_and_filtered(antares: Live) -> None:
    for number in range(3):
        await antares.ask(x_request_id=f"r{number}")
    await antares.ask(x_request_id="no", x_slo_ttft_ms="0.001")

    assert await listed(antares) == ["no", "r2", "r1", "r0"]
    assert await listed(antares, "?limit=2") == ["no", "r2"]
    assert await listed(antares, "?outcome=rejected") == ["no"]
    assert await listed(antares, "?tenant=anonymous&limit=1") == ["no"]
    assert await listed(antares, "?tenant=other") == []


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "limit=x", "limit=-1", "limit=%D9%A1", "outcome=lost", "page=2", "a=" + "x" * 2000],
)
async def test_malformed_query_gets_400(antares: Live, query: str) -> None:
    answer = await antares.http.get(f"/v1/requests?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


async def test_unknown_request_gets_404_and_wrong_method_405(antares: Live) -> None:
    assert (await antares.http.get("/v1/requests/unknown")).status_code == 404
    assert (await antares.http.get("/v1/requests/a/b")).status_code == 404
    assert (await antares.http.post("/v1/requests", json={})).status_code == 405
    assert (await antares.http.head("/v1/requests")).status_code == 200


async def test_tenant_sees_its_own_requests_only() -> None:
    async with live(keys=KEYS) as antares:
        alice, bob = {"x-api-key": ALICE}, {"x-api-key": BOB}
        for headers in (alice, bob):
            tenant = "alice" if headers is alice else "bob"
            for name in ("same", f"of-{tenant}"):
                answer = await antares.http.post(CHAT, json=chat(), headers={**headers, "x-request-id": name})
                assert answer.status_code == 200

        assert (await record(antares, "same", **alice))["tenant"] == "alice"
        assert (await record(antares, "same", **bob))["tenant"] == "bob"
        assert (await antares.http.get("/v1/requests/of-bob", headers=alice)).status_code == 404
        of_bob = (await record(antares, "of-bob", **bob))["id"]
        assert (await antares.http.get(f"/v1/requests/{of_bob}", headers=alice)).status_code == 404
        assert await listed(antares, "", **alice) == ["of-alice", "same"]
        assert await listed(antares, "?tenant=bob", **alice) == []
        assert (await antares.http.get("/v1/requests")).status_code == 401


async def test_records_are_bounded_and_their_ids_are_forgotten() -> None:
    async with live(decisions={"keep": 3}) as antares:
        for number in range(5):
            await antares.ask(x_request_id=f"r{number}")
        await antares.ask(x_request_id="r3")

        assert await listed(antares) == ["r3", "r4", "r3"]
        assert (await antares.http.get("/v1/requests/r0")).status_code == 404
        decisions = antares.gateway.proxy.recorder.decisions
        assert len(decisions) == 3
        assert len(decisions._by_id) == 5  # of six, since two share an id


async def test_keep_0_keeps_nothing() -> None:
    async with live(decisions={"keep": 0}) as antares:
        await antares.ask(x_request_id="r")
        assert await listed(antares) == []


async def test_slow_body_is_the_largest_part_of_a_late_request() -> None:
    async with live(fast_engine()) as antares:

        async def slow() -> Any:
            body = b'{"model":"simulated","max_tokens":2,"messages":[{"role":"user","content":"x"}]}'
            yield body[:20]
            await asyncio.sleep(0.7)
            yield body[20:]

        headers = {"x-request-id": "slow", "x-slo-ttft-ms": "600", "content-type": "application/json"}
        await antares.http.post(CHAT, content=slow(), headers={**headers, "x-slo-class": "batch"})
        found = await record(antares, "slow")

    assert found["timeline"]["received_ms"] > 650
    assert "receiving the request's body" in explain(found)


async def test_explain_command_prints_the_explanation(antares: Live) -> None:
    await antares.ask(x_request_id="no", x_slo_ttft_ms="0.001")

    async def run(*arguments: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, ["explain", *arguments, "--url", antares.url])

    explained = await run("no")
    assert explained.exit_code == 0, explained.output
    assert "Request no was rejected" in explained.output
    assert '"ttft_unattainable"' in (await run("no", "--json")).output
    unknown = await run("a/b?c")
    assert unknown.exit_code == 1


def test_explain_command_says_that_no_gateway_answers() -> None:
    result = CliRunner().invoke(app, ["explain", "x", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "cannot ask http://127.0.0.1:9" in result.output
    assert "set --url" in result.output


async def test_explain_command_sends_the_key() -> None:
    async with live(keys=KEYS) as antares:
        headers = {"x-api-key": BOB, "x-request-id": "mine"}
        await antares.http.post(CHAT, json=chat(), headers=headers)

        def run(variable: str) -> Any:
            return CliRunner(env={"BOBS_KEY": BOB, "ANTARES_KEY": ""}).invoke(
                app, ["explain", "mine", "--url", antares.url, "--key-env", variable]
            )

        assert (await asyncio.to_thread(run, "BOBS_KEY")).exit_code == 0
        assert (await asyncio.to_thread(run, "ANTARES_KEY")).exit_code == 2, "the variable is named, but not set"


async def test_request_beyond_the_open_limit_is_recorded() -> None:
    async with live(server={"max_open_requests": 1}) as antares:
        antares.gateway.engine_queues[0].admission.policy = _nothing()
        asking = asyncio.create_task(antares.ask(x_request_id="first"))
        await eventually(lambda: antares.gateway.engine_queues[0].waiting)
        assert (await antares.ask(x_request_id="second")).status_code == 429
        asking.cancel()
        await eventually(antares.is_idle)
        found = await record(antares, "second")

    assert found["reason"] == "gateway_full"
    assert "too many open requests" in explain(found)


def test_record_costs_little() -> None:
    """A generous outer bound: it takes about 5 us."""
    decisions, entry = Decisions(), Entry(make_request())
    began = time.process_time()
    for _ in range(1000):
        decisions.ended(RequestRecord.of(entry, 200))
    assert time.process_time() - began < 0.2
