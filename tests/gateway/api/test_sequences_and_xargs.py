"""Several answers to one request, and what the engine is told about its pace."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine_adapter.engine import Receive, Scope, Send
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.policies.slack.batch import E2E_EASE
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, events, eventually, fast_engine, live


def remember_bodies(antares: Live) -> list[dict[str, Any]]:
    """What the engine is sent from now on."""
    bodies: list[dict[str, Any]] = []
    inner = antares.engine.app

    async def spy(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting() -> Any:
            message = await receive()
            if message.get("body"):
                bodies.append(json.loads(message["body"]))
            return message

        await inner(scope, noting, send)

    antares.engine._app = spy  # type: ignore[assignment]
    return bodies


@pytest.mark.parametrize("stream", [False, True])
async def test_tpot_of_several_answers_is_counted_for_each(stream: bool) -> None:
    async with live(fast_engine(times=StepTimes(d=0.01))) as antares:
        answer = await antares.ask(chat(n=3, stream=stream), x_slo_report="1")
        text = answer.text.split(": antares ")[1].split("\n")[0] if stream else json.dumps(answer.json()["antares"])
        slo_report = json.loads(text)
        assert slo_report["output_tokens"] == 24
        # A step takes 10 ms. Counted as one sequence, three would make 3.3 or 30 of it.
        assert 9 < slo_report["tpot_ms"] < 28


async def test_several_prompts_make_several_answers() -> None:
    async with live(fast_engine(times=StepTimes(d=0.01))) as antares:
        body = {"prompt": ["one", "two", "three"], "n": 2, "max_tokens": 8, "stream": True}
        answer = await antares.ask(body, TEXT, x_slo_report="1")
        assert {chunk["choices"][0]["index"] for chunk in events(answer.text)} == set(range(6))
        assert 9 < json.loads(answer.text.split(": antares ")[1].split("\n")[0])["tpot_ms"] < 20


async def test_an_answer_in_one_piece_has_its_ttft_and_tpot_measured_in_the_engine() -> None:
    async with live(fast_engine(times=StepTimes(d=0.01, alpha=0.02))) as antares:
        slo_report = (await antares.ask(chat("a b"), x_slo_report="1")).json()["antares"]
        assert 39 < slo_report["ttft_ms"] < 80
        # A step takes 10 ms. Counted as one sequence, three would make 3.3 or 30 of it.
        assert 9 < slo_report["tpot_ms"] < 28
        assert slo_report["e2e_ms"] == pytest.approx(slo_report["ttft_ms"] + 7 * slo_report["tpot_ms"], rel=0.2)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_token_has_no_tpot(antares: Live, stream: bool) -> None:
    answer = await antares.ask(chat(max_tokens=1, stream=stream), x_slo_report="1")
    assert '"tpot_ms":0.0' in answer.text
    assert '"attained":true' in answer.text


async def test_the_usage_chunk_passes_through(antares: Live) -> None:
    answer = await antares.ask(chat(stream=True, stream_options={"include_usage": True}))
    assert events(answer.text)[-1]["usage"]["completion_tokens"] == 8


async def test_the_tpot_bound_travels_to_the_engine_and_shows_in_the_gates_counters(antares: Live) -> None:
    bodies = remember_bodies(antares)
    await antares.ask(x_slo_tpot_ms="250")
    assert bodies[0]["vllm_xargs"] == {"antares_tpot_ms": 250, "antares_gate": "slack"}
    metrics = (await antares.http.get("/metrics")).text
    assert 'antares_gate_batched_total{engine="simulated",tpot_ms="250"} 7.0' in metrics


async def test_an_e2e_bound_travels_as_the_pace_it_implies(antares: Live) -> None:
    bodies = remember_bodies(antares)
    await antares.ask(x_slo_class="free", x_slo_e2e_ms="3200")
    # Nothing waits, so that all of it, but for a moment, is left for the 8 tokens that are expected.
    paced = pytest.approx(E2E_EASE * 400, rel=0.1)
    assert bodies[0]["vllm_xargs"] == {"antares_tpot_ms": paced, "antares_gate": "slack"}


async def test_a_clients_own_xargs_are_kept_and_ours_cannot_be_forged(antares: Live) -> None:
    bodies = remember_bodies(antares)
    forged = {"simulated_output_tokens": 3, "antares_tpot_ms": 0.001, "antares_other": 1}
    await antares.ask(chat(vllm_xargs=forged))
    assert bodies[0]["vllm_xargs"] == {"simulated_output_tokens": 3, "antares_tpot_ms": 1000, "antares_gate": "slack"}


@pytest.mark.parametrize("forged", [{"antares_tpot_ms": 0.001}, {}])
async def test_without_a_bound_the_gate_alone_is_named_and_what_was_forged_is_gone(antares: Live, forged: Any) -> None:
    bodies = remember_bodies(antares)
    await antares.ask(chat(vllm_xargs=forged), x_slo_class="free")
    assert bodies[0]["vllm_xargs"] == {"antares_gate": "slack"}, "which is to know whom it may hold back"


async def test_best_effort_is_sent_no_pace_so_that_it_makes_way() -> None:
    infeasible = {"ttft_ms": 0.001, "tpot_ms": 0.001, "on_unattainable": "best_effort"}
    async with live(classes={"hopeless": infeasible}, default_class="hopeless") as antares:
        bodies = remember_bodies(antares)
        await antares.ask()
        assert bodies[0]["vllm_xargs"] == {"antares_gate": "slack"}


async def test_a_policy_that_gates_nothing_adds_nothing() -> None:
    async with live(policy={"name": "fcfs"}) as antares:
        bodies = remember_bodies(antares)
        await antares.ask()
        assert bodies[0] == chat()
        assert "antares_gate_eligible_total{" not in (await antares.http.get("/metrics")).text


async def test_an_engine_that_reads_no_xargs_is_sent_none(antares: Live) -> None:
    antares.engine.takes_xargs = False  # type: ignore[attr-defined]
    bodies = remember_bodies(antares)
    await antares.ask()
    assert bodies[0] == chat()


async def test_every_other_field_reaches_the_engine_unchanged(antares: Live) -> None:
    bodies = remember_bodies(antares)
    body = chat(temperature=0.25, stop=["é", "\n"], tools=[{"type": "function"}], seed=2**53, unheard_of={"a": None})
    await antares.http.post(CHAT, json=body, headers={"x-slo-class": "free"})
    assert bodies[0] == {**body, "vllm_xargs": {"antares_gate": "slack"}}


def answer_with_the_body(antares: Live) -> None:
    """From now on, the engine does."""

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    antares.engine._app = echo  # type: ignore[assignment]


async def test_on_routes_that_are_only_passed_on_ours_cannot_be_forged_either(antares: Live) -> None:
    answer_with_the_body(antares)
    forged = {"input": "hi", "vllm_xargs": {"antares_tpot_ms": 0.001, "mine": 1}}
    assert (await antares.ask(forged, path="/v1/responses")).json() == {"input": "hi", "vllm_xargs": {"mine": 1}}
    plain = b'{ "input" :  "untouched" }'
    assert (await antares.http.post("/v1/responses", content=plain)).content == plain


FORGED = '{"input": "hi", "vllm_xargs": {"antares_tpot_ms": 1}}'


@pytest.mark.parametrize(
    "content_types",
    [
        ["Application/JSON"],
        ["APPLICATION/json ; charset=utf-8"],
        ["application/vnd.api+json"],
        [""],
        ["text/plain", "application/json"],
    ],
)
async def test_whatever_reads_as_json_is_read(antares: Live, content_types: list[str]) -> None:
    answer_with_the_body(antares)
    headers = [("content-type", given) for given in content_types]
    answer = await antares.http.post("/v1/responses", content=FORGED.encode(), headers=headers)
    assert answer.json() == {"input": "hi"}


@pytest.mark.parametrize(
    "body",
    [
        FORGED.replace("1", "NaN").encode(),
        FORGED.replace("1", "1e999").encode(),
        FORGED.replace("hi", "\\ud800").encode(),
        b"\xef\xbb\xbf" + FORGED.encode(),
        FORGED.encode("utf-16"),
        FORGED.encode("utf-32"),
        FORGED.replace('"hi"', "[" * 1100 + "]" * 1100).encode(),
        FORGED.encode() + b"x",
    ],
)
@pytest.mark.parametrize("path", ["/v1/responses", CHAT])
async def test_json_that_only_a_lax_parser_takes_goes_nowhere(antares: Live, body: bytes, path: str) -> None:
    answer_with_the_body(antares)
    answer = await antares.http.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_of_a_field_given_twice_the_last_counts_as_in_the_engine(antares: Live) -> None:
    answer_with_the_body(antares)
    body = b'{"vllm_xargs": {"mine": 1}, "vllm_xargs": {"antares_tpot_ms": 1}, "input": "hi"}'
    assert (await antares.http.post("/v1/responses", content=body)).json() == {"input": "hi"}


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/octet-stream"])
async def test_no_body_and_what_is_no_json_are_passed_on_as_they_came(antares: Live, content_type: str) -> None:
    answer_with_the_body(antares)
    body = b"" if content_type == "application/json" else b"\xff{ no"
    headers = {"content-type": content_type}
    answer = await antares.http.post("/v1/responses/1/cancel", content=body, headers=headers)
    assert (answer.status_code, answer.content) == (200, body)


def form(disposition: str, value: str = "1") -> bytes:
    parts = ["content-disposition: form-data; name=\"file\"; filename*=UTF-8''a.wav\r\n\r\nnoise"]
    parts += [f"Content-Disposition: form-data;{disposition}\r\n\r\n{value}"]
    return "".join(f"--xx\r\n{part}\r\n" for part in parts).encode() + b"--xx--\r\n"


@pytest.mark.parametrize(
    ("disposition", "charset", "param"),
    [
        (' name="vllm_xargs"', "", "vllm_xargs"),
        (' name="vllm_xargs"', "; charset=UTF-8", "vllm_xargs"),
        ("NAME = vllm_xargs", "", "vllm_xargs"),
        (" name*=utf-8''vllm%5Fxargs", "", "vllm_xargs"),
        (' name*0="vllm_"; name*1="xargs"', "", "vllm_xargs"),
        (' name="+AHY-llm+AF8-xargs"', "; charset=utf-7", "content-type"),
        (' name="+AHY-llm+AF8-xargs"', "; Charset*=utf-8''utf-7", "content-type"),
        (' name="+AHY-llm+AF8-xargs"', "; charset=utf-8; charset = utf-7", "content-type"),
    ],
)
async def test_a_form_cannot_forge_a_pace_either(antares: Live, disposition: str, charset: str, param: str) -> None:
    headers = {"content-type": f"Multipart/form-data; boundary=xx{charset}"}
    body = form(disposition, '{"antares_tpot_ms": 1}')
    answer = await antares.http.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("charset", ["", "; charset=UTF-8", '; charset="utf8" ; x=y'])
@pytest.mark.parametrize(("name", "refused"), [("seed", True), ("seeds", False), ("prompt", False)])
async def test_a_form_is_passed_on_unless_the_engine_refuses_a_field(
    antares: Live, name: str, refused: bool, charset: str
) -> None:
    answer_with_the_body(antares)
    antares.engine.unsupported_reason = lambda body: "seed: not here." if "seed" in body else None  # type: ignore[method-assign]
    headers = {"content-type": f"multipart/form-data; boundary=xx{charset}"}
    answer = await antares.http.post("/v1/audio/transcriptions", content=form(f' name="{name}"'), headers=headers)
    assert answer.status_code == (400 if refused else 200), answer.text


async def test_what_an_engine_refuses_it_refuses_on_every_route(antares: Live) -> None:
    antares.engine.unsupported_reason = lambda body: "seed: not here." if "seed" in body else None  # type: ignore[method-assign]
    answer = await antares.ask({"input": "hi", "seed": 1}, path="/v1/responses")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")


async def test_what_an_engine_refuses_once_it_is_up_it_refuses_of_those_that_waited_for_it() -> None:
    async with live(fast_engine(restart_s=0.2)) as antares:
        antares.engine.crash()
        asking = asyncio.create_task(antares.ask(chat(seed=1)))
        await eventually(lambda: antares.gateway.engine_queues[0].waiting)
        antares.engine.unsupported_reason = lambda body: "seed: not here." if "seed" in body else None  # type: ignore[method-assign]
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")
        assert antares.is_idle()
        assert antares.outcomes["rejected"] == 1


async def test_more_answers_than_the_engine_runs_are_refused() -> None:
    async with live(fast_engine(max_num_seqs=4)) as antares:
        answer = await antares.ask(chat(n=5))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
