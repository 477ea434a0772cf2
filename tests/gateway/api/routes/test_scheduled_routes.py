"""Every generation route is scheduled, measured and reported, and answers errors in the shape of its API."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import time
from collections.abc import AsyncIterable
from typing import Any

import anthropic
import openai
import pytest

from engine_adapter.engine import ASGIApp, Receive, Scope, Send
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import CHAT, TEXT, AdmitNothing, Live, chat, fast_engine, live
from tests.fixtures.live_server import eventually

RESPONSES, MESSAGES, BATCH = "/v1/responses", "/v1/messages", "/v1/chat/completions/batch"


def body_of(path: str, text: str = "tell me a story", **fields: Any) -> dict[str, Any]:
    if path == RESPONSES:
        return {"model": "simulated", "input": text, **fields}
    if path == MESSAGES:
        return {"model": "simulated", "max_tokens": 64, "messages": [{"role": "user", "content": text}], **fields}
    if path == TEXT:
        return {"model": "simulated", "prompt": text, **fields}
    return chat(text, **fields)


SCHEDULED = pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, MESSAGES])
NEW = pytest.mark.parametrize("path", [RESPONSES, MESSAGES])


def report_of(text: str) -> dict[str, Any]:
    found = re.search(r"^: antares (\{.*\})$", text, re.MULTILINE)
    return dict(json.loads(found[1])) if found else dict(json.loads(text)["antares"])


@SCHEDULED
@pytest.mark.parametrize("stream", [False, True])
async def test_request_is_scheduled_measured_and_reported(path: str, stream: bool) -> None:
    async with live(fast_engine(times=StepTimes(d=0.01))) as antares:
        times = antares.record_tokens()
        answer = await antares.ask(body_of(path, stream=stream), path, x_slo_report="1", x_slo_tpot_ms="900")
        ended_s = time.monotonic()
        assert answer.status_code == 200
        report = report_of(answer.text)
        assert (report["attained"], report["output_tokens"], report["slo_tpot_ms"]) == (True, 8, 900)
        (tokens,) = times.of.values()
        until_last_ms = report["ttft_ms"] + 7 * report["tpot_ms"]
        if stream:
            # Tokens count when they are sent to the client. The seven steps between them take 70 ms or more.
            assert 20 < 7 * report["tpot_ms"] <= 1000 * (ended_s - tokens[0]) + 0.1
            assert report["e2e_ms"] == pytest.approx(until_last_ms, abs=0.2)
        else:
            assert report["tpot_ms"] == pytest.approx(times.tpot_ms, abs=0.02)
            assert until_last_ms - 0.2 <= report["e2e_ms"] <= 1000 * (ended_s - times.called_s) + report["ttft_ms"]
        assert float(answer.headers["x-antares-predicted-ttft-ms"]) > 0
        assert answer.headers.get_list("x-request-id") != []
        assert antares.outcomes == {"finished": 1, "rejected": 0, "failed": 0, "cancelled": 0}
        metrics = (await antares.http.get("/metrics")).text
        assert f'antares_http_requests_total{{route="{path}",status="200"}} 1.0' in metrics
        assert 'antares_gate_batched_total{engine="simulated",tpot_ms="900"} 7.0' in metrics


@NEW
async def test_stream_is_the_engine_bytes_and_the_report_precedes_its_last_event(antares: Live, path: str) -> None:
    answer = await antares.ask(body_of(path, stream=True), path, x_slo_report="1")
    *_, comment, last, end = answer.text.split("\n\n")
    assert comment.startswith(": antares {")
    assert last.startswith({RESPONSES: "event: response.completed", MESSAGES: "event: message_stop"}[path])
    assert end == ""
    plain = await antares.ask(body_of(path, stream=True), path)
    assert ": antares" not in plain.text
    names = re.findall("^event: (.*)$", plain.text, re.MULTILINE)
    assert names == re.findall("^event: (.*)$", answer.text, re.MULTILINE)


@NEW
@pytest.mark.parametrize("stream", [False, True])
async def test_unattainable_bound_is_rejected_in_the_shape_of_the_api(antares: Live, path: str, stream: bool) -> None:
    answer = await antares.ask(body_of(path, stream=stream), path, x_slo_ttft_ms="0.5", x_request_id="mine")
    document, error = answer.json(), answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (429, "ttft_unattainable", "x-slo-ttft-ms")
    assert 0 < error["predicted_ms"] <= error["attainable_ms"]
    assert (answer.headers["x-should-retry"], answer.headers["x-request-id"]) == ("false", "mine")
    assert int(answer.headers["retry-after"]) >= 1
    expected = {RESPONSES: (None, "slo_unattainable"), MESSAGES: ("error", "rate_limit_error")}[path]
    assert (document.get("type"), error["type"]) == expected
    assert antares.outcomes["rejected"] == 1


@pytest.mark.parametrize(
    ("status", "config", "headers", "kind"),
    [
        (400, {}, {"x_slo_class": "none"}, "invalid_request_error"),
        (401, {"keys": [{"tenant": "a", "sha256": "0" * 64}]}, {}, "authentication_error"),
        (413, {"server": {"max_body_bytes": 1024}}, {}, "request_too_large"),
        (429, {"server": {"max_open_requests": 1}}, {}, "rate_limit_error"),
    ],
)
async def test_anthropic_error_type_follows_the_status(
    status: int, config: dict[str, Any], headers: dict[str, str], kind: str
) -> None:
    async with live(**config) as antares:
        text = "x" * 2000 if status == 413 else "hi"
        if status == 429:
            antares.gateway.proxy.open_requests.used += 1
        answer = await antares.ask(body_of(MESSAGES, text), MESSAGES, x_request_id="r-1", **headers)
        document = answer.json()
        assert (answer.status_code, document["type"], document["error"]["type"]) == (status, "error", kind)
        assert (document["request_id"], answer.headers["x-request-id"]) == ("r-1", "r-1")


async def test_anthropic_error_while_draining_is_overloaded(antares: Live) -> None:
    antares.gateway.proxy.draining = True
    for path in (MESSAGES, MESSAGES + "/count_tokens"):
        answer = await antares.ask(body_of(MESSAGES), path)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (503, "overloaded_error", "draining")


@NEW
async def test_engine_that_dies_ends_a_stream_with_the_api_error_event(path: str) -> None:
    async with live(fast_engine(times=StepTimes(d=0.02))) as antares:
        body = body_of(
            path, stream=True, ignore_eos=True, **{"max_output_tokens" if path == RESPONSES else "max_tokens": 500}
        )
        async with antares.http.stream("POST", path, json=body) as response:
            lines = response.aiter_lines()
            for _ in range(20):
                await anext(lines)
            antares.engine.crash()
            rest = [line async for line in lines if line]
        event, data = rest[-2:]
        document = json.loads(data.removeprefix("data: "))
        assert (event, document["type"], document["error"]["code"]) == ("event: error", "error", "engine_lost")
        if path == RESPONSES:
            seen = [json.loads(line.removeprefix("data: "))["sequence_number"] for line in rest if '"sequence' in line]
            assert seen == list(range(seen[0], seen[0] + len(seen)))
            assert (document["code"], document["message"]) == ("engine_lost", document["error"]["message"])
        await eventually(antares.is_idle)
        assert antares.outcomes["failed"] == 1


@SCHEDULED
async def test_waiting_requests_of_every_route_share_the_queue(path: str) -> None:
    async with live() as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        tasks = [asyncio.create_task(antares.ask(body_of(path), path)) for _ in range(3)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 3)
        status = (await antares.http.get("/status")).json()
        assert status["ledger"]["open"] == 3
        for task in tasks:
            task.cancel()
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 3


async def test_48_responses_beside_a_paced_chat_are_not_all_admitted_at_once() -> None:
    """Each sequence costs 3 ms a step, so 48 at once would take 145 ms, over the chat's bound of 50 ms."""
    engine = fast_engine(times=StepTimes(b=3e-3, d=1e-3, alpha=1e-6), output_tokens=40)
    async with live(engine, policy={"name": "slack"}, default_class="free") as antares:
        chat_task = asyncio.create_task(antares.ask(x_slo_tpot_ms="50", x_slo_report="1"))
        await eventually(lambda: antares.engine.state.engine_running == 1)
        others = [
            asyncio.create_task(antares.ask(body_of(RESPONSES), RESPONSES, x_slo_tpot_ms="50")) for _ in range(48)
        ]
        await eventually(lambda: antares.gateway.ledger.open_count > 40 or chat_task.done())
        most_running = 0
        while not chat_task.done():
            most_running = max(most_running, len(antares.gateway.engine_queues[0].running))
            await asyncio.sleep(0.01)
        assert 1 < most_running < 30, "the responses were counted, and not all admitted at once"
        assert (await chat_task).status_code == 200
        for task in others:
            task.cancel()
        await eventually(antares.is_idle)


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_forged_gate_members_are_removed(antares: Live, path: str) -> None:
    bodies = antares.record_bodies()
    forged = {"antares_tpot_ms": 0.001, "antares_kind": "paced", "mine": 1}
    await antares.ask(body_of(path, vllm_xargs=forged), path, x_slo_tpot_ms="250")
    assert bodies[0]["vllm_xargs"] == {"antares_tpot_ms": 250, "antares_gate": "slack", "mine": 1}


async def test_openai_client_reads_responses(antares: Live) -> None:
    client = openai.AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", max_retries=0)
    whole = await client.responses.create(model="simulated", input="tell me a story", instructions="be short")
    assert whole.usage is not None
    assert (whole.usage.output_tokens, len(whole.output_text.split()) > 3) == (8, True)
    async with client.responses.stream(model="simulated", input="tell me a story", instructions="be short") as stream:
        final = await stream.get_final_response()
    assert final.output_text == whole.output_text
    with pytest.raises(openai.RateLimitError) as caught:
        await client.responses.create(model="simulated", input="hi", extra_headers={"x-slo-ttft-ms": "0.5"})
    assert caught.value.code == "ttft_unattainable"


async def test_anthropic_client_reads_messages(antares: Live) -> None:
    client = anthropic.AsyncAnthropic(base_url=antares.url, api_key="none", max_retries=0)
    ask: Any = {"model": "simulated", "max_tokens": 64, "messages": [{"role": "user", "content": "tell me a story"}]}
    whole = await client.messages.create(**ask)
    assert (whole.usage.output_tokens, whole.stop_reason) == (8, "end_turn")
    async with client.messages.stream(**ask) as stream:
        final = await stream.get_final_message()
    assert final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    counted = await client.messages.count_tokens(model="simulated", messages=ask["messages"])
    assert counted.input_tokens == 4
    with pytest.raises(anthropic.RateLimitError) as caught:
        await client.messages.create(**ask, extra_headers={"x-slo-ttft-ms": "0.5"})
    assert caught.value.body["error"]["attainable_ms"] > 0  # type: ignore[index]


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_sdk_raises_for_the_error_event(path: str) -> None:
    async with live(fast_engine(times=StepTimes(d=0.02))) as antares:
        if path == RESPONSES:
            client = openai.AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.APIError, match="died"):
                await read_to_a_crash(antares, await client.responses.create(
                    model="simulated", input="a", stream=True, extra_body={"ignore_eos": True, "max_output_tokens": 500}
                ))  # fmt: skip
            return
        anthropic_client = anthropic.AsyncAnthropic(base_url=antares.url, api_key="none", max_retries=0)
        with pytest.raises(anthropic.APIError, match="died"):
            await read_to_a_crash(antares, await anthropic_client.messages.create(
                model="simulated", max_tokens=500, stream=True, extra_body={"ignore_eos": True},
                messages=[{"role": "user", "content": "a"}],
            ))  # fmt: skip


async def read_to_a_crash(antares: Live, events: AsyncIterable[object]) -> None:
    """Read ``events``. The engine crashes after the first one."""
    crashed = False
    async for _ in events:
        if not crashed:
            antares.engine.crash()
            crashed = True


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"background": "yes"}, "background"),
        (RESPONSES, {"input": None}, "input"),
        (RESPONSES, {"input": {"role": "user"}}, "input"),
        (RESPONSES, {"input": ["hi"]}, "input[0]"),
        (RESPONSES, {"input": [{"role": "user", "content": 1}]}, "input[0].content"),
        (RESPONSES, {"instructions": 5}, "instructions"),
        (RESPONSES, {"max_output_tokens": "many"}, "max_output_tokens"),
        (RESPONSES, {"stream": "yes"}, "stream"),
        (MESSAGES, {"messages": []}, "messages"),
        (MESSAGES, {"messages": ["hi"]}, "messages[0]"),
        (MESSAGES, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (MESSAGES, {"system": 5}, "system"),
        (MESSAGES, {"max_tokens": -1}, "max_tokens"),
        (BATCH, {"messages": []}, "messages"),
        (BATCH, {"messages": ["hi"]}, "messages"),
        (BATCH, {"messages": [[{"role": "user", "content": "hi"}]] * 300}, "messages"),
        (BATCH, {"messages": [[{"role": "user", "content": "hi"}]], "n": 2}, "n"),
    ],
)
async def test_bad_body_gets_400_that_names_the_member(
    antares: Live, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = await antares.ask(body_of(path) | fields, path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert antares.gateway.ledger.accepted == 0


async def test_batch_counts_one_sequence_for_each_conversation(antares: Live) -> None:
    seen: list[Any] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        running = antares.gateway.engine_queues[0].running.values()
        seen.extend((request.sequences, request.prompt_tokens) for request in running)
        seen.append(json.loads((await receive())["body"]).get("vllm_xargs"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    antares.engine.stub = answer
    chats = [[{"role": "user", "content": "word " * words}] for words in (3, 50, 7)]
    assert (await antares.ask({"messages": chats}, BATCH)).status_code == 200
    (sequences, prompt_tokens), xargs = seen
    assert (sequences, xargs) == (3, None)
    assert 50 <= prompt_tokens <= 70


OPENAI_404 = {"error": {"message": "no model", "type": "NotFoundError", "param": "model", "code": 404}}


@pytest.mark.parametrize("path", [MESSAGES, MESSAGES + "/count_tokens"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "document", [OPENAI_404, {"type": "error", "error": {"type": "NotFoundError", "message": "no model"}}]
)
async def test_engine_error_gets_the_shape_of_the_messages_api(
    antares: Live, path: str, parts: int, document: dict[str, Any]
) -> None:
    data = json.dumps(document).encode()

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", b"application/json"), (b"Content-Length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        if parts == 2:
            await send({"type": "http.response.body", "body": data[:9], "more_body": True})
        await send({"type": "http.response.body", "body": data[9:] if parts == 2 else data})

    antares.engine.stub = refuse
    answer = await antares.ask(body_of(MESSAGES), path, x_request_id="r-1")
    error = answer.json()["error"]
    assert (answer.status_code, answer.json()["type"], answer.json()["request_id"]) == (404, "error", "r-1")
    assert (error["type"], error["message"]) == ("not_found_error", "no model")
    assert antares.outcomes["rejected"] == (path == MESSAGES)


GENERIC = "The engine answered with status 502."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"type": "missing", "loc": ["body"], "msg": "Field required"}]}', "Field required"),
        (b'{"object": "error", "message": "no such model"}', "no such model"),
        (b'{"error": "no such model"}', "no such model"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"<html>no</html>", GENERIC),
        (b"[]", GENERIC),
        (b"{}", GENERIC),
        (b"", GENERIC),
    ],
)
async def test_engine_error_of_any_form_gets_the_shape_of_the_messages_api(
    antares: Live, data: bytes, message: str
) -> None:
    antares.engine.stub = _refusing(data)
    answer = await antares.ask(body_of(MESSAGES), MESSAGES)
    assert (answer.status_code, answer.headers.get_list("content-type")) == (502, ["application/json"])
    assert answer.json()["error"] == {"message": message, "type": "api_error"}


async def test_compressed_engine_error_passes_unchanged(antares: Live) -> None:
    antares.engine.stub = _refusing(gzip.compress(b'{"detail": "no"}'), (b"Content-Encoding", b"gzip"))
    answer = await antares.ask(body_of(MESSAGES), MESSAGES)
    assert (answer.status_code, answer.json()) == (502, {"detail": "no"})


async def test_long_engine_error_passes_unchanged(antares: Live) -> None:
    antares.engine.stub = _refusing(b"x" * 100_000)
    answer = await antares.ask(body_of(MESSAGES), MESSAGES)
    assert (answer.status_code, answer.content) == (502, b"x" * 100_000)


def _refusing(data: bytes, *headers: tuple[bytes, bytes]) -> ASGIApp:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        head = [(b"content-type", b"text/html"), *headers]
        await send({"type": "http.response.start", "status": 502, "headers": head})
        for at in range(0, len(data), 30_000):
            await send({"type": "http.response.body", "body": data[at : at + 30_000], "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return refuse
