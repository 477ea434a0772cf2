"""Responses, Messages and chat batches on a real vLLM, with the official SDKs: scheduled, paced and reported."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.fixtures.otlp_collector import StandInCollector, attributes
from tests.fixtures.sdk_requests import LONG, QUESTION
from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import CONTEXT, KEY, MODEL

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

RESPONSES, MESSAGES, BATCH = "/v1/responses", "/v1/messages", "/v1/chat/completions/batch"
AUTH = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def openai_client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def anthropic_client(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.base, api_key=KEY, max_retries=0, timeout=120)


def slo(tpot_ms: int) -> dict[str, str]:
    """Bounds with a TPOT bound that no other test has, and the key."""
    return {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": str(tpot_ms), "x-slo-report": "1", **AUTH}


def test_trace_of_a_request_has_its_phases(served: Served, collector: StandInCollector) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body = {"model": MODEL, "prompt": QUESTION, "max_tokens": 12, "ignore_eos": True, "stream": True}
    headers = {"traceparent": f"00-{trace}-{parent}-01", **slo(5000)}
    began = time.time_ns()
    answer = httpx.post(f"{served.base}/v1/completions", json=body, headers=headers, timeout=120)
    answer_ms = (time.time_ns() - began) / 1e6
    assert answer.text.endswith("data: [DONE]\n\n")
    until = time.monotonic() + 60  # the exporter sends every 5 s
    while not collector.servers and time.monotonic() < until:
        time.sleep(0.1)
    (server,) = collector.servers
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (trace, parent)
    found = attributes(server)
    assert found["gen_ai.request.model"] == MODEL
    assert found["gen_ai.usage.output_tokens"] == 12
    assert found["antares.outcome"] == "finished"
    phases = {
        span.name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 for span in collector.children(server)
    }
    # An idle engine does not wait for the predicted length, which may arrive after the admission.
    assert phases.keys() >= {"queue", "prefill", "decode"}
    assert phases["prefill"] > 1
    assert phases["decode"] > 5 * found["antares.tpot_ms"]
    assert sum(phases[name] for name in ("queue", "prefill", "decode")) <= answer_ms
    assert QUESTION.encode() not in b"".join(collector.bodies)


def paced(served: Served, tpot_ms: int) -> float:
    """Decode opportunities of requests with this pace that the gate inside vLLM saw."""
    return served.metric("antares_gate_eligible_total", tpot_ms=str(tpot_ms))


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def report_of(text: str) -> dict[str, Any]:
    found = re.search(r"^: antares (\{.*\})$", text, re.MULTILINE)
    assert found is not None, text
    return dict(json.loads(found[1]))


def test_plain_response_is_paced_and_reported(served: Served, openai_client: openai.OpenAI) -> None:
    raw = openai_client.responses.with_raw_response.create(
        model=MODEL, input=QUESTION, temperature=0, max_output_tokens=24, extra_headers=slo(4201)
    )
    response = raw.parse()
    assert "Paris" in response.output_text
    report = response.model_extra["antares"]  # type: ignore[index]
    assert response.usage is not None
    assert (report["attained"], report["output_tokens"]) == (True, response.usage.output_tokens)
    assert 0 < report["ttft_ms"] < report["e2e_ms"]
    assert float(raw.headers["x-antares-predicted-ttft-ms"]) > 0
    assert raw.headers["x-request-id"]
    wait_until(lambda: paced(served, 4201) > 0)


def test_streamed_response_is_paced_and_reported(served: Served, openai_client: openai.OpenAI) -> None:
    with openai_client.responses.stream(
        model=MODEL, input=QUESTION, temperature=0, max_output_tokens=24, extra_headers=slo(4202)
    ) as stream:
        final = stream.get_final_response()
    assert "Paris" in final.output_text
    body = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 24, "stream": True}
    answer = httpx.post(f"{served.base}{RESPONSES}", json=body, headers=slo(4202), timeout=120)
    *_, comment, last, end = answer.text.split("\n\n")
    assert (last.startswith("event: response.completed\n"), end) == (True, "")
    report = report_of(comment)
    assert final.usage is not None
    assert (report["attained"], report["output_tokens"]) == (True, final.usage.output_tokens)
    assert 0 < report["ttft_ms"] < report["e2e_ms"]
    wait_until(lambda: paced(served, 4202) > 0)


def test_plain_message_is_paced_and_reported(served: Served, anthropic_client: anthropic.Anthropic) -> None:
    raw = anthropic_client.messages.with_raw_response.create(
        model=MODEL,
        max_tokens=24,
        extra_body={"temperature": 0},
        system="Answer in one sentence.",
        messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        extra_headers=slo(4203),
    )
    message = raw.parse()
    assert message.content[0].type == "text"
    assert "Paris" in message.content[0].text
    report = message.model_extra["antares"]  # type: ignore[index]
    assert (report["attained"], report["output_tokens"]) == (True, message.usage.output_tokens)
    assert raw.headers["x-request-id"]
    wait_until(lambda: paced(served, 4203) > 0)


def test_streamed_message_is_paced_and_reported(served: Served, anthropic_client: anthropic.Anthropic) -> None:
    ask: Any = {"model": MODEL, "max_tokens": 24, "messages": [{"role": "user", "content": QUESTION}]}
    with anthropic_client.messages.stream(**ask, extra_body={"temperature": 0}, extra_headers=slo(4204)) as stream:
        final = stream.get_final_message()
    ask["temperature"] = 0
    assert "Paris" in final.content[0].text  # type: ignore[union-attr]
    answer = httpx.post(f"{served.base}{MESSAGES}", json={**ask, "stream": True}, headers=slo(4204), timeout=120)
    *_, comment, last, end = answer.text.split("\n\n")
    assert (last.startswith("event: message_stop\n"), end) == (True, "")
    assert report_of(comment)["output_tokens"] == final.usage.output_tokens
    wait_until(lambda: paced(served, 4204) > 0)


def test_count_tokens_is_answered_and_not_scheduled(served: Served, anthropic_client: anthropic.Anthropic) -> None:
    accepted = served.get("/status").json()["ledger"]["accepted"]
    counter, route = "antares_http_requests_total", "/v1/messages/count_tokens"
    before = served.metric(counter, route=route, status="200")
    counted = anthropic_client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": QUESTION}])
    message = anthropic_client.messages.create(
        model=MODEL, max_tokens=1, messages=[{"role": "user", "content": QUESTION}]
    )
    assert counted.input_tokens == message.usage.input_tokens
    assert served.get("/status").json()["ledger"]["accepted"] == accepted + 1
    assert served.metric(counter, route=route, status="200") == before + 1


def test_batch_of_chats_is_paced_although_its_body_takes_no_xargs(served: Served) -> None:
    chats = [[{"role": "user", "content": text}] for text in (QUESTION, "Say hello.", "Count to three.")]
    body = {"model": MODEL, "messages": chats, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{served.base}{BATCH}", json=body, headers=slo(4205), timeout=120).json()
    assert len(answer["choices"]) == 3
    assert answer["antares"]["output_tokens"] == answer["usage"]["completion_tokens"]
    wait_until(lambda: paced(served, 4205) > 0)


def test_sdks_raise_for_an_unattainable_bound(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic
) -> None:
    with pytest.raises(openai.RateLimitError) as of_openai:
        openai_client.responses.create(model=MODEL, input=QUESTION, extra_headers={"x-slo-ttft-ms": "1"})
    assert (of_openai.value.code, of_openai.value.type) == ("ttft_unattainable", "slo_unattainable")
    with pytest.raises(anthropic.RateLimitError) as of_anthropic:
        anthropic_client.messages.create(
            model=MODEL,
            max_tokens=5,
            messages=[{"role": "user", "content": QUESTION}],
            extra_headers={"x-slo-ttft-ms": "1"},
        )
    error = of_anthropic.value.body["error"]  # type: ignore[index]
    assert (error["type"], error["code"]) == ("rate_limit_error", "ttft_unattainable")
    assert 1 < error["predicted_ms"] < error["attainable_ms"]


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"model": "unknown"}, 404, "not_found_error"),
        ({"max_tokens": CONTEXT + 1}, 400, "invalid_request_error"),
    ],
)
def test_engine_error_has_the_shape_of_the_messages_api(
    served: Served, fields: dict[str, Any], status: int, kind: str
) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": QUESTION}], **fields}
    answer = httpx.post(f"{served.base}{MESSAGES}", json=body, headers=AUTH, timeout=120)
    document = answer.json()
    assert (answer.status_code, document["type"], document["error"]["type"]) == (status, "error", kind)
    assert document["error"]["message"]


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_forged_gate_members_never_reach_the_gate(served: Served, path: str) -> None:
    fields = (
        {"input": QUESTION, "max_output_tokens": 5}
        if path == RESPONSES
        else {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 5}
    )
    forged = {"antares_tpot_ms": 4999, "antares_kind": "paced"}
    answer = httpx.post(
        f"{served.base}{path}",
        json={"model": MODEL, **fields, "vllm_xargs": forged},
        headers={**slo(4206), "x-slo-class": "batch"},
        timeout=120,
    )
    assert answer.status_code == 200
    wait_until(lambda: paced(served, 4206) > 0)
    assert paced(served, 4999) == 0


def test_stored_response_is_retrieved_continued_and_not_cancellable(
    served: Served, openai_client: openai.OpenAI
) -> None:
    first = openai_client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=16)
    assert openai_client.responses.retrieve(first.id).output_text == first.output_text
    second = openai_client.responses.create(
        model=MODEL, input="And of Italy?", previous_response_id=first.id, temperature=0, max_output_tokens=16
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    with pytest.raises(openai.APIStatusError):
        openai_client.responses.cancel(first.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve("resp_unknown")
    unstored = openai_client.responses.create(model=MODEL, input="Hi", store=False, max_output_tokens=4)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(unstored.id)
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.responses.create(model=MODEL, input="Hi", background=True)
    assert caught.value.param == "background"
    assert served.metric("antares_http_requests_total", route="/v1/responses/{id}", status="404") == 2
    assert served.metric("antares_http_requests_total", route="/v1/responses/{id}/cancel") == 1


def test_many_responses_beside_a_chat_are_queued_and_counted(served: Served) -> None:
    """Responses by other clients were once all admitted at once, and uncounted."""
    body = {"model": MODEL, "input": QUESTION, "max_output_tokens": 20, "ignore_eos": True}
    alone = httpx.post(f"{served.base}{RESPONSES}", json=body, headers=slo(4207), timeout=120).json()
    # A bound that this machine meets for a few at once.
    tpot_ms = max(150, round(4 * alone["antares"]["tpot_ms"]))
    wait_until(lambda: served.get("/status").json()["ledger"]["open"] == 0)
    before = served.get("/metrics").text
    most_running = most_waiting = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most_running, most_waiting
        while not done.is_set():
            text = served.get("/metrics").text
            most_running = max(most_running, int(served.metric("antares_running_requests", text)))
            most_waiting = max(most_waiting, int(served.metric("antares_waiting_requests", text)))
            time.sleep(0.05)

    def respond(_: int) -> int:
        headers = {"x-slo-ttft-ms": "120000", "x-slo-tpot-ms": str(tpot_ms), **AUTH}
        return httpx.post(f"{served.base}{RESPONSES}", json=body, headers=headers, timeout=180).status_code

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(respond, range(16)))
    done.set()
    watcher.join()
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 1
    assert most_running >= 1
    assert most_waiting + most_running > 1
    name = "antares_requests_total"
    finished, rejected = (
        served.metric(name, outcome=outcome) - served.metric(name, before, outcome=outcome)
        for outcome in ("finished", "rejected")
    )
    assert (finished, rejected) == (statuses.count(200), statuses.count(429))
    assert paced(served, tpot_ms) > 0
    assert served.get("/status").json()["ledger"]["open"] == 0


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_client_that_disconnects_frees_the_engine(served: Served, path: str) -> None:
    before = served.metric("antares_requests_total", outcome="cancelled")
    body = {"model": MODEL, "stream": True, **LONG[path]}
    headers = {"x-slo-class": "batch", **AUTH}
    with httpx.stream("POST", f"{served.base}{path}", json=body, headers=headers, timeout=120) as response:
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
        assert served.metric("antares_engine_running_sequences") == 1
    wait_until(lambda: served.metric("antares_engine_running_sequences") == 0)
    wait_until(lambda: served.metric("antares_requests_total", outcome="cancelled") == before + 1)
