"""Cached prefixes and prompt sizes on a real vLLM: what is predicted, what is served, and prompts that are too long."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.fixtures.sdk_requests import estimated_prompts
from tests.fixtures.served import Served, serve
from tests.fixtures.tools_gateway import CONTEXT, KEY, MODEL

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
BLOCK = 128
"""Tokens of a block of vLLM's prefix cache on CPU."""
NO_HURRY = {"x-slo-ttft-ms": "300000", "x-slo-tpot-ms": "10000"}
TURNS = 6
"""Turns of a chat: enough that most of its prompt tokens are cached."""


@pytest.fixture(scope="module")
def outer(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway with ``kind: http`` in front of the first one. It cannot count prompts, so it estimates them."""
    classes = {"chat": {"ttft_ms": 5000, "tpot_ms": 10000}}
    engine = {"kind": "http", "base_url": served.base, "api_key_env": "KEY_OF_THE_INNER", "send_slo": False}
    config = {"engines": [engine], "classes": classes, "default_class": "chat"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_OF_THE_INNER", KEY)
        running = serve(tmp_path_factory.mktemp("outer"), config)
    yield running
    running.stop()


@dataclass
class Tokens:
    """The tokens of prompts since the last `since`, by what the gateway predicted and what vLLM reported."""

    served: Served
    before: dict[str, float] = field(default_factory=dict)

    def now(self) -> dict[str, float]:
        until = time.monotonic() + 20
        while self.served.metric("antares_ledger_open", text := self.served.get("/metrics").text):
            assert time.monotonic() < until  # a request is counted soon after its answer
            time.sleep(0.05)
        kinds = ("prompt", "predicted", "cached")
        return {kind: self.served.metric("antares_prefix_cache_tokens_total", text, kind=kind) for kind in kinds}

    def since(self) -> dict[str, int]:
        now = self.now()
        change = {kind: round(now[kind] - self.before.get(kind, 0)) for kind in now}
        self.before = now
        return change


def post(served: Served, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
    body = {"model": MODEL, "temperature": 0, **body}
    headers = {"authorization": f"Bearer {KEY}", **(headers or {})}
    return httpx.post(f"{served.base}{path}", json=body, headers=headers, timeout=300)


def text_of(words: int, seed: str) -> str:
    """Words of one token each. Texts with different seeds share no block."""
    return f"{seed}: " + " ".join(("one", "two", "red", "blue", "day", "night", "sun")[i * i % 7] for i in range(words))


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **fields}


def prompt_of(path: str, usage: dict[str, int]) -> int:
    if path == MESSAGES:
        return usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    return usage["input_tokens" if path == RESPONSES else "prompt_tokens"]


def growing_chat(served: Served, seed: str) -> list[httpx.Response]:
    """A chat whose history is sent again with each turn. The first turn measures how fast this machine is."""
    messages: list[dict[str, str]] = []
    answers: list[httpx.Response] = []
    headers = {**NO_HURRY, "x-slo-report": "1"}
    for turn in range(TURNS):
        messages.append({"role": "user", "content": text_of(280, f"{seed}, turn {turn}")})
        answers.append(post(served, CHAT, {"messages": messages, "max_tokens": 8}, headers))
        if answers[-1].status_code != 200:
            break
        document = answers[-1].json()
        if turn == 0:
            # 3 s, or enough for two turns without cache on a slower machine: never for the whole history.
            headers["x-slo-ttft-ms"] = str(max(3000, 2.5 * document["antares"]["ttft_ms"]))
        messages.append({"role": "assistant", "content": document["choices"][0]["message"]["content"]})
    return answers


def test_growing_chat_is_served_whole(served: Served) -> None:
    tokens = Tokens(served)
    tokens.since()
    answers = growing_chat(served, "whole")
    assert [answer.status_code for answer in answers] == [200] * TURNS
    usages = [answer.json()["usage"] for answer in answers]
    change = tokens.since()
    assert change["prompt"] == sum(usage["prompt_tokens"] for usage in usages)
    assert change["cached"] == sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert change["cached"] > change["prompt"] / 2
    # The last token of an answer is never computed, so a block that it would complete is not cached.
    assert abs(change["predicted"] - change["cached"]) <= 2 * BLOCK


def test_repeated_prompt_is_served_with_a_bound_that_only_the_cache_meets(served: Served) -> None:
    body = ask(text_of(2000, "repeated"))
    tokens = Tokens(served)
    tokens.since()
    cold = post(served, CHAT, body, NO_HURRY).json()
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert tokens.since()["predicted"] == 0

    def attainable_ms(**fields: str) -> float:
        """The TTFT that the gateway could promise. Measured ones depend on what else the machine does."""
        rejected = post(served, CHAT, {**body, **fields}, {**NO_HURRY, "x-slo-ttft-ms": "1"})
        return float(rejected.json()["error"]["attainable_ms"])

    def bound() -> dict[str, str]:
        """Headers with a bound between both promises, made anew because the step-time model learns meanwhile."""
        return {**NO_HURRY, "x-slo-ttft-ms": str(math.sqrt(attainable_ms() * attainable_ms(cache_salt="another")))}

    tokens.since()
    for _ in range(2):
        cached = post(served, CHAT, body, bound())
        assert cached.status_code == 200, cached.text
    change = tokens.since()
    assert change["cached"] > 0.9 * change["prompt"]
    assert change["predicted"] == pytest.approx(change["cached"], rel=0.05)

    other = post(served, CHAT, {**body, "cache_salt": "other"}, bound())
    assert (other.status_code, other.json()["error"]["code"]) == (429, "ttft_unattainable")
    assert other.headers["x-should-retry"] == "false"


def test_salt_isolates_the_prefix_cache(served: Served) -> None:
    tokens = Tokens(served)
    tokens.since()
    changes = []
    for salt in (None, "mine", "yours", "mine"):
        body = ask(text_of(400, "salted")) | ({"cache_salt": salt} if salt else {})
        assert post(served, CHAT, body, NO_HURRY).status_code == 200
        changes.append(tokens.since())
    assert [change["cached"] for change in changes] == [0, 0, 0, 3 * BLOCK]
    assert [change["predicted"] for change in changes] == [0, 0, 0, pytest.approx(3 * BLOCK, rel=0.05)]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, ask(text_of(290, "chat"))),
        (CHAT, ask([{"type": "text", "text": text_of(290, "parts")}], tools=[], tool_choice="none")),  # type: ignore[arg-type]
        (COMPLETIONS, {"prompt": text_of(290, "completion"), "max_tokens": 2}),
        (COMPLETIONS, {"prompt": [7 + number % 40 for number in range(300)], "max_tokens": 2}),
        (MESSAGES, ask(text_of(290, "message"), system="Answer briefly.")),
        (RESPONSES, {"input": text_of(290, "response"), "instructions": "Answer briefly.", "max_output_tokens": 2}),
    ],
)
def test_prompt_and_its_cached_part_are_known_before_they_are_scheduled(
    served: Served, path: str, fields: dict[str, Any]
) -> None:
    """The gateway predicts the hit of the second request from the tokens that it scheduled with: to the token."""
    estimated = estimated_prompts(served)
    fields = {name: value for name, value in fields.items() if value != []}
    tokens = Tokens(served)
    for cached in (0, 2 * BLOCK):
        tokens.since()
        answer = post(served, path, fields, NO_HURRY)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        change = tokens.since()
        assert (change["prompt"], change["cached"]) == (prompt_of(path, usage), cached)
        # The index lowers its predictions by the share that vLLM did not confirm lately.
        assert change["predicted"] == pytest.approx(cached, rel=0.05)
    assert estimated_prompts(served) == estimated, "nothing was estimated"


@pytest.mark.parametrize("headers", [{}, {"x-slo-ttft-ms": "1"}], ids=["no bounds", "impossible bound"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
def test_prompt_beyond_the_context_gets_the_error_of_the_engine(
    served: Served, path: str, stream: bool, headers: dict[str, str]
) -> None:
    """A client compacts its history on this error. A rejection would name a bound that it never sent."""
    text = "word " * 9000
    fields: dict[str, Any] = {
        CHAT: ask(text),
        COMPLETIONS: {"prompt": text, "max_tokens": 2},
        MESSAGES: ask(text),
        RESPONSES: {"input": text},
    }[path]
    refused = served.metric("antares_requests_total", reason="engine_refused")
    answer = post(served, path, {**fields, "stream": stream}, headers)
    document = answer.json()
    assert answer.status_code == 400
    assert f"maximum context length is {CONTEXT} tokens" in document["error"]["message"]
    if path == MESSAGES:
        assert (document["type"], document["error"]["type"]) == ("error", "invalid_request_error")
    assert served.count("antares_requests_total", refused + 1, reason="engine_refused") == refused + 1


def test_too_many_output_tokens_get_the_error_of_the_engine(served: Served) -> None:
    answer = post(served, CHAT, ask("Hello") | {"max_tokens": CONTEXT + 1}, {"x-slo-ttft-ms": "1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


def test_growing_chat_is_served_whole_through_a_remote_gateway(outer: Served) -> None:
    """The outer gateway estimates sizes, and learns them and the hits from the usage that the inner one reports."""
    tokens = Tokens(outer)
    answers = growing_chat(outer, "remote")
    assert [answer.status_code for answer in answers] == [200] * TURNS
    change = tokens.since()
    assert change["cached"] > change["prompt"] / 2
    assert change["predicted"] > change["cached"] / 2
    assert outer.count("antares_prompt_size_error_ratio_count", TURNS) == TURNS
    errors = outer.metric("antares_prompt_size_error_ratio_sum")
    assert errors / TURNS < 0.25


def test_prompt_beyond_the_context_gets_the_error_of_the_remote_engine(outer: Served) -> None:
    answer = post(outer, CHAT, ask("word " * 9000), {"x-slo-ttft-ms": "1"})
    assert answer.status_code == 400
    assert f"maximum context length is {CONTEXT} tokens" in answer.json()["error"]["message"]
