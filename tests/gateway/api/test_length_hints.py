"""Output lengths that clients state: `x-slo-output-tokens` and `nvext.agent_hints.osl`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.prediction.client import HINT_P90, LengthPredictor
from gateway.prediction.lengths import LengthStatistics
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, live


def osl(tokens: Any) -> dict[str, Any]:
    return {"nvext": {"agent_hints": {"osl": tokens}}}


async def predicted(antares: Live, body: dict[str, Any], path: str = CHAT, **headers: str) -> float:
    answer = await antares.ask(body, path, x_slo_report="1", **headers)
    assert answer.status_code == 200, answer.text
    tokens: float = answer.json()["antares"]["predicted_tokens"]
    return tokens


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        (chat(), {}, 8),
        (chat(), {"x_slo_output_tokens": "300"}, 300),
        (chat(**osl(300)), {}, 300),
        (chat(**osl(300)), {"x_slo_output_tokens": "20"}, 20),
        (chat(max_tokens=50), {"x_slo_output_tokens": "300"}, 50),
        (chat(max_completion_tokens=50, **osl(300)), {}, 50),
        (chat(min_tokens=40), {"x_slo_output_tokens": "3"}, 40),
        (chat(), {"x_slo_output_tokens": "007"}, 7),
        (chat(nvext=None), {}, 8),
        (chat(nvext=[1]), {}, 8),
        (chat(nvext={"agent_hints": "fast"}), {}, 8),
        (chat(nvext={"agent_hints": {"osl": None}}), {}, 8),
    ],
)
async def test_hint_replaces_the_prediction(
    antares: Live, body: dict[str, Any], headers: dict[str, str], expected: float
) -> None:
    assert await predicted(antares, body, **headers) == expected


async def test_hint_is_at_most_what_the_context_holds(antares: Live) -> None:
    tokens = await predicted(antares, chat("a b"), x_slo_output_tokens="10000000")
    assert 8000 < tokens < antares.engine.state.max_model_len


async def test_hint_applies_to_text_completions(antares: Live) -> None:
    # Without `max_tokens`, the API's own default of 16 applies.
    assert await predicted(antares, {"prompt": "a"}, TEXT, x_slo_output_tokens="9") == 9
    assert await predicted(antares, {"prompt": "a"}, TEXT, x_slo_output_tokens="90") == 16


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "", "NaN", "inf", "1.5", "1e3", "1_000", "+5", "0x10", "10000001", "9" * 400, "ten", "\u0661"],
)
async def test_malformed_header_gets_400_that_names_it(antares: Live, text: str) -> None:
    answer = await antares.http.post(CHAT, json=chat(), headers={"x-slo-output-tokens": text.encode()})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "x-slo-output-tokens")
    assert len(error["message"]) < 200


@pytest.mark.parametrize("tokens", [0, -5, 1.5, "300", True, [1], {}, 10**30, 10_000_001])
async def test_malformed_field_gets_400_that_names_it(antares: Live, tokens: Any) -> None:
    answer = await antares.http.post(CHAT, content=json.dumps(chat(**osl(tokens))))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "nvext.agent_hints.osl")


async def test_hint_saves_the_call_of_the_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    async with live() as antares:

        async def forbidden(*args: Any, **named: Any) -> None:
            raise AssertionError("the predictor was asked")

        monkeypatch.setattr(antares.gateway.predictor, "predict", forbidden)
        assert await predicted(antares, chat(), x_slo_output_tokens="5") == 5
        exposition = (await antares.http.get("/metrics")).text
        assert 'antares_predictions_total{source="hint"} 1.0' in exposition


async def test_true_length_of_a_hinted_request_is_learned(antares: Live) -> None:
    for _ in range(3):
        await predicted(antares, chat(max_tokens=3, ignore_eos=True), x_slo_output_tokens="1")
    assert await predicted(antares, chat()) == 3


def hinted(hint: int, usual: int, max_tokens: float = float("inf")) -> Request:
    statistics = LengthStatistics()
    for _ in range(20):
        statistics.observe("chat", usual)
    request = Request("a", "chat", 0.0, Slo(), prompt_tokens=10, predicted_tokens=1.0, max_tokens=max_tokens)
    prediction = LengthPredictor(None, 1.0, statistics).from_hint(hint, "chat", max_tokens)
    request.predict(prediction.tokens, prediction.p90, prediction.beyond)
    return request


def test_p90_of_a_hint_is_close_to_it() -> None:
    request = hinted(100, usual=500)
    assert (request.predicted_tokens, request.predicted_p90) == (100, 100 * HINT_P90)
    assert (hinted(100, 500, max_tokens=110).predicted_p90, hinted(100, 500, max_tokens=60).predicted_tokens) == (
        110,
        60,
    )


def test_request_that_slightly_outlives_its_hint_keeps_to_it() -> None:
    request = hinted(100, usual=500)
    request.advance(101)
    assert 101 < request.predicted_tokens < 125


@pytest.mark.parametrize("hint", [1, 10, 100])
def test_request_that_outlives_a_wrong_hint_gets_the_length_of_its_class(hint: int) -> None:
    request = hinted(hint, usual=500)
    for _ in range(round(hint * HINT_P90) + 5):
        request.advance(1)
    assert request.predicted_tokens >= 500
    revisions = 0
    previous = request.predicted_tokens
    for _ in range(4000):
        request.advance(1)
        revisions += request.predicted_tokens != previous
        previous = request.predicted_tokens
    assert request.predicted_tokens > request.generated
    assert revisions < 200


@pytest.mark.parametrize("hint", [1, 8, 10_000])
async def test_wrong_hint_does_not_break_the_request(hint: int) -> None:
    async with live() as antares:
        body = chat(max_tokens=60, ignore_eos=True)
        answer = await antares.ask(body, x_slo_output_tokens=str(hint), x_slo_report="1")
        assert answer.json()["antares"]["output_tokens"] == 60
        assert antares.is_idle()
