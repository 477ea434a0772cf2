"""Requests with several sequences, and the ``vllm_xargs`` that the gateway sends to the step gate."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from engine_adapter.gates.constants import SLACK
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, events, fast_engine, live


@pytest.mark.parametrize("stream", [False, True])
async def test_tpot_of_several_sequences_is_measured_per_sequence(stream: bool) -> None:
    async with live(fast_engine(times=StepTimes(d=0.01))) as antares:
        times = antares.record_tokens()
        answer = await antares.ask(chat(n=3, stream=stream), x_slo_report="1")
        text = answer.text.split(": antares ")[1].split("\n")[0] if stream else json.dumps(answer.json()["antares"])
        slo_report = json.loads(text)
        assert slo_report["output_tokens"] == 24
        # Three sequences counted as one would give a third of it, or three times as much.
        assert slo_report["tpot_ms"] == pytest.approx(times.tpot_ms, abs=0.02)
        assert [len(tokens) for tokens in times.of.values()] == [8, 8, 8]


async def test_several_prompts_with_n_give_every_sequence() -> None:
    async with live(fast_engine(times=StepTimes(d=0.01))) as antares:
        times = antares.record_tokens()
        body = {"prompt": ["one", "two", "three"], "n": 2, "max_tokens": 8, "stream": True}
        answer = await antares.ask(body, TEXT, x_slo_report="1")
        assert {chunk["choices"][0]["index"] for chunk in events(answer.text)} == set(range(6))
        slo_report = json.loads(answer.text.split(": antares ")[1].split("\n")[0])
        assert slo_report["tpot_ms"] == pytest.approx(times.tpot_ms, abs=0.02)


async def test_plain_response_has_ttft_and_tpot_of_the_engine() -> None:
    async with live(fast_engine(times=StepTimes(d=0.01, alpha=0.02))) as antares:
        times = antares.record_tokens()
        sent_s = time.monotonic()
        slo_report = (await antares.ask(chat("a b"), x_slo_report="1")).json()["antares"]
        ended_s = time.monotonic()
        (tokens,) = times.of.values()
        assert slo_report["tpot_ms"] == pytest.approx(times.tpot_ms, abs=0.02)
        # The request arrived after it was sent, and before the engine was called. Its prompt takes 40 ms.
        assert 39 < 1000 * (tokens[0] - times.called_s) <= slo_report["ttft_ms"] + 0.1
        assert slo_report["ttft_ms"] <= 1000 * (tokens[0] - sent_s) + 0.1
        assert 1000 * (tokens[-1] - times.called_s) - 0.1 <= slo_report["e2e_ms"] <= 1000 * (ended_s - sent_s) + 0.1


@pytest.mark.parametrize("stream", [False, True])
async def test_one_token_has_tpot_zero(antares: Live, stream: bool) -> None:
    answer = await antares.ask(chat(max_tokens=1, stream=stream), x_slo_report="1")
    assert '"tpot_ms":0.0' in answer.text
    assert '"attained":true' in answer.text


async def test_usage_chunk_passes_through(antares: Live) -> None:
    answer = await antares.ask(chat(stream=True, stream_options={"include_usage": True}))
    assert events(answer.text)[-1]["usage"]["completion_tokens"] == 8


async def test_tpot_bound_reaches_the_engine_and_the_gate_metrics(antares: Live) -> None:
    bodies = antares.record_bodies()
    await antares.ask(x_slo_tpot_ms="250")
    assert bodies[0]["vllm_xargs"] == {"antares_tpot_ms": 250, "antares_gate": "slack"}
    metrics = (await antares.http.get("/metrics")).text
    assert 'antares_gate_batched_total{engine="simulated",tpot_ms="250"} 7.0' in metrics


async def test_e2e_bound_reaches_the_engine_as_a_pace(antares: Live) -> None:
    bodies = antares.record_bodies()
    await antares.ask(x_slo_class="free", x_slo_e2e_ms="3200")
    # No request waits, so nearly the whole bound is left for the 8 predicted tokens.
    pace = pytest.approx(SLACK.e2e_pace_factor * 400, rel=0.1)
    assert bodies[0]["vllm_xargs"] == {"antares_tpot_ms": pace, "antares_gate": "slack"}


async def test_client_xargs_are_kept_except_forged_gateway_members(antares: Live) -> None:
    bodies = antares.record_bodies()
    forged = {"simulated_output_tokens": 3, "antares_tpot_ms": 0.001, "antares_other": 1}
    await antares.ask(chat(vllm_xargs=forged))
    assert bodies[0]["vllm_xargs"] == {"simulated_output_tokens": 3, "antares_tpot_ms": 1000, "antares_gate": "slack"}


@pytest.mark.parametrize("forged", [{"antares_tpot_ms": 0.001}, {}])
async def test_request_without_bound_sends_only_the_gate(antares: Live, forged: Any) -> None:
    bodies = antares.record_bodies()
    await antares.ask(chat(vllm_xargs=forged), x_slo_class="free")
    assert bodies[0]["vllm_xargs"] == {"antares_gate": "slack"}


WAIVED = {"on_unattainable": "best_effort"}


@pytest.mark.parametrize("forged", [None, "paced", "deadline_only", "best_effort"])
@pytest.mark.parametrize(
    ("slo_class", "sent"),
    [
        ({"tpot_ms": 900}, {"antares_tpot_ms": 900}),
        ({"ttft_ms": 5000, "tpot_ms": 900}, {"antares_tpot_ms": 900}),
        ({"ttft_ms": 5000}, {"antares_kind": "deadline_only"}),
        ({}, {}),
        ({"ttft_ms": 0.001, **WAIVED}, {}),
        ({"ttft_ms": 0.001, "tpot_ms": 0.001, **WAIVED}, {"antares_tpot_ms": 1000, "antares_kind": "best_effort"}),
        ({"ttft_ms": 0.001, "tpot_ms": 2000, **WAIVED}, {"antares_tpot_ms": 2000, "antares_kind": "best_effort"}),
        ({"e2e_ms": 0.001, **WAIVED}, {"antares_tpot_ms": 1000, "antares_kind": "best_effort"}),
    ],
    ids=["tpot", "ttft and tpot", "ttft", "no bound", "waived ttft", "waived tpot", "loose waived tpot", "waived e2e"],
)
async def test_kind_is_sent_only_where_the_pace_does_not_imply_it(
    slo_class: dict[str, Any], sent: dict[str, Any], forged: str | None
) -> None:
    async with live(classes={"only": slo_class}, default_class="only") as antares:
        bodies = antares.record_bodies()
        body = chat() if forged is None else chat(vllm_xargs={"antares_kind": forged})
        assert (await antares.ask(body)).status_code == 200
        assert [received["vllm_xargs"] for received in bodies] == [{"antares_gate": "slack", **sent}]


async def test_ungated_policy_drops_a_forged_kind() -> None:
    async with live(policy={"name": "fcfs"}) as antares:
        bodies = antares.record_bodies()
        await antares.ask(chat(vllm_xargs={"antares_kind": "paced"}))
        await antares.ask(chat(vllm_xargs={"antares_kind": "paced", "mine": 1}))
        assert bodies == [chat(), chat(vllm_xargs={"mine": 1})]


async def test_ungated_policy_sends_the_client_body() -> None:
    async with live(policy={"name": "fcfs"}) as antares:
        bodies = antares.record_bodies()
        await antares.ask()
        assert bodies[0] == chat()
        assert "antares_gate_eligible_total{" not in (await antares.http.get("/metrics")).text


async def test_engine_without_xargs_gets_the_client_body(antares: Live) -> None:
    antares.engine.takes_xargs = False  # type: ignore[attr-defined]
    bodies = antares.record_bodies()
    await antares.ask()
    assert bodies[0] == chat()


async def test_other_fields_reach_the_engine_unchanged(antares: Live) -> None:
    bodies = antares.record_bodies()
    body = chat(temperature=0.25, stop=["é", "\n"], tools=[{"type": "function"}], seed=2**53, unknown_field={"a": None})
    await antares.http.post(CHAT, json=body, headers={"x-slo-class": "free"})
    assert bodies[0] == {**body, "vllm_xargs": {"antares_gate": "slack"}}
