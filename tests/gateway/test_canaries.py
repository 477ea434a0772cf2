"""Keys, prompts and completions appear in no log at debug level, metric, status, record, feed or error."""

from __future__ import annotations

import base64
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway.api.auth import hash_key
from gateway.observability import logs
from tests.fixtures.live_gateway import CHAT, Live, chat, live
from tests.fixtures.served_process import served

KEY, WRONG, OPERATOR = "alice-canary-key-51a7f0", "wrong-canary-key-93bb21", "operator-canary-key-77c0"
PROMPT, COMPLETION = "marimba-prompt-canary-6610", "glockenspiel-completion-canary-8842"
SECRETS = [KEY, WRONG, OPERATOR, *map(hash_key, (KEY, WRONG, OPERATOR))]
CANARIES = [*SECRETS, PROMPT, COMPLETION]

KEYS: list[dict[str, Any]] = [
    {"sha256": hash_key(KEY), "tenant": "alice", "requests_per_minute": 1000, "tokens_per_minute": 20_000},
    {"sha256": hash_key(OPERATOR), "tenant": "ops", "operator": True},
]
AUTH = {"authorization": f"Bearer {KEY}"}


def bodies() -> Iterator[tuple[str, bytes]]:
    """Yield path and body of requests with the prompt, well-formed and not."""
    tool = {"type": "function", "function": {"name": "f", "description": PROMPT, "parameters": {"type": "object"}}}
    message = {"role": "user", "content": PROMPT}
    documents: list[tuple[str, dict[str, Any]]] = [
        (CHAT, chat(PROMPT, max_tokens=4)),
        (CHAT, chat(PROMPT, max_tokens=4, stream=True, tools=[tool], user=PROMPT, cache_salt=PROMPT)),
        (CHAT, chat(PROMPT, max_tokens=PROMPT)),
        (CHAT, chat(PROMPT, n=10_000)),
        (CHAT, chat(PROMPT, model=7)),
        (CHAT, {"model": "simulated", "messages": PROMPT}),
        (CHAT, {"model": "simulated", "messages": [{"role": PROMPT, "content": {PROMPT: PROMPT}}]}),
        (CHAT, chat((PROMPT + " ") * 30_000)),
        ("/v1/completions", {"model": "simulated", "prompt": [PROMPT, PROMPT], "max_tokens": 2}),
        ("/v1/responses", {"model": "simulated", "input": PROMPT, "instructions": PROMPT}),
        ("/v1/messages", {"model": "simulated", "messages": [message], "system": PROMPT, "max_tokens": 2}),
        ("/v1/embeddings", {"model": "simulated", "input": PROMPT}),
        ("/v1/rerank", {"query": PROMPT, "documents": [PROMPT]}),
    ]
    for path, document in documents:
        yield path, json.dumps(document).encode()
    yield CHAT, b'{"messages": [{"content": "' + PROMPT.encode() + b'"'
    yield CHAT, json.dumps(PROMPT).encode()
    yield CHAT, PROMPT.encode() + b"\xff"
    yield CHAT, b'{"a":' * 2000 + PROMPT.encode()


HEADERS: list[dict[str, str]] = [
    AUTH,
    {"x-api-key": KEY},
    {**AUTH, "x-slo-ttft-ms": "0.001"},
    {**AUTH, "x-slo-tpot-ms": "0.001"},
    {"authorization": f"Bearer {WRONG}"},
    {"x-api-key": WRONG},
    {**AUTH, "x-api-key": WRONG},
    {"authorization": f"Basic {base64.b64encode(f'user:{KEY}'.encode()).decode()}"},
    {"authorization": KEY},
    {},
]


async def provoke(http: httpx.AsyncClient) -> list[str]:
    """Send every kind of request and return the texts of the error responses."""
    errors: list[str] = []
    for path, body in bodies():
        for headers in HEADERS:
            answer = await http.post(path, content=body, headers={"content-type": "application/json", **headers})
            assert not any(secret in answer.text for secret in SECRETS)
            if answer.status_code >= 400:
                errors.append(answer.text)
    for path in ("/status", "/metrics", "/v1/requests", "/dashboard/events", "/reload"):
        for headers in HEADERS:
            answer = await http.request("POST" if path == "/reload" else "GET", path, headers=headers)
            errors.append(answer.text)
    return errors


async def pages(http: httpx.AsyncClient) -> list[str]:
    """Return what an operator can read."""
    operator = {"authorization": f"Bearer {OPERATOR}"}
    texts = []
    for path in ("/metrics", "/status", "/v1/requests?limit=200", "/dashboard", "/docs", "/openapi.json"):
        answer = await http.get(path, headers={**operator, "accept": "application/openmetrics-text"})
        assert answer.status_code == 200
        texts.append(answer.text)
    listed = (await http.get("/v1/requests", headers=operator)).json()["data"]
    assert listed
    texts.append((await http.get(f"/v1/requests/{listed[0]['id']}", headers=operator)).text)
    async with http.stream("GET", "/dashboard/events", headers=operator) as feed:
        feed_text = ""
        async for part in feed.aiter_text():
            feed_text += part
            if "event: snapshot" in feed_text and feed_text.endswith("\n\n"):
                break
    return [*texts, feed_text]


def found(texts: list[str]) -> list[str]:
    """Return the canaries in ``texts``."""
    return [canary for canary in CANARIES if any(canary in text for text in texts)]


@pytest.mark.process
async def test_no_canary_in_logs_of_a_gateway_at_debug_level(tmp_path: Path) -> None:
    config = {
        "server": {"port": 0, "operator_auth": True, "drain_s": 1},
        "engines": [{"kind": "simulated", "max_model_len": 4096, "step_times": {"d": 0.0005}}],
        "classes": {"chat": {"ttft_ms": 5000, "tpot_ms": 1000}},
        "default_class": "chat",
        "keys": KEYS,
        "logging": {"level": "debug", "access": "json", "access_path": str(tmp_path / "access.jsonl")},
    }
    async with served(tmp_path, json.dumps(config)) as (process, http):
        assert process.stderr is not None
        errors = await provoke(http)
        texts = await pages(http)
        process.terminate()
        log = (await process.stderr.read()).decode()
        await process.wait()
    access = (tmp_path / "access.jsonl").read_text()
    assert len(errors) > 100
    assert access.count("\n") > 100
    assert "draining" in log
    assert found([*errors, *texts, log, access]) == []


@pytest.fixture
def debug_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[StringIO]:
    """The log of a gateway at debug level, and what the libraries log."""
    log = StringIO()
    root, antares = logging.getLogger(), logging.getLogger("antares")
    before = root.level, antares.handlers, antares.level, antares.propagate
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    logs.configure("debug", "text")
    libraries = logging.StreamHandler(log)
    root.addHandler(libraries)
    root.setLevel(logging.DEBUG)
    yield log
    root.removeHandler(libraries)
    root.level, antares.handlers, antares.level, antares.propagate = before
    logging.captureWarnings(False)


async def answering(antares: Live, fail: str) -> None:
    """Have the engine stream the completion, and then end as ``fail`` says."""

    async def stub(scope: Any, receive: Any, send: Any) -> None:
        if fail == "before":
            raise RuntimeError(f"cannot serve {PROMPT} with {KEY}: {COMPLETION}")
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        event = json.dumps({"choices": [{"index": 0, "delta": {"content": COMPLETION}}]}).encode()
        await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        if fail == "within":
            raise RuntimeError(f"cannot serve {PROMPT} with {KEY}: {COMPLETION}") from ValueError(COMPLETION)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    antares.engine.stub = stub


@pytest.mark.parametrize("fail", ["", "before", "within"])
async def test_no_canary_of_a_completion_or_of_a_failing_engine(fail: str, debug_log: StringIO) -> None:
    async with live(keys=KEYS) as antares:
        await answering(antares, fail)
        embedding = {"model": "simulated", "input": PROMPT}
        for path, body in ((CHAT, chat(PROMPT, stream=True)), ("/v1/embeddings", embedding)):
            try:
                answer = await antares.ask(body, path, **AUTH)
            except httpx.RemoteProtocolError:
                assert (fail, path) == ("within", "/v1/embeddings"), "a partial response cannot be repaired"
                continue
            assert (COMPLETION in answer.text) == (fail != "before")
            assert not any(secret in answer.text for secret in [*SECRETS, PROMPT])
            assert (answer.status_code >= 500) == (fail == "before")
        texts = await pages(antares.http)
    log = debug_log.getvalue()
    assert ("RuntimeError" in log) == bool(fail)
    assert found([*texts, log]) == []


async def test_no_canary_when_the_gateway_itself_fails(monkeypatch: pytest.MonkeyPatch, debug_log: StringIO) -> None:
    async with live(keys=KEYS) as antares:

        def fail(*arguments: Any) -> None:
            raise KeyError(PROMPT) from ValueError(KEY)

        monkeypatch.setattr(antares.gateway.proxy, "guard", SimpleNamespace(apply=fail))
        answer = await antares.ask(chat(PROMPT), **AUTH)
        assert answer.status_code == 500
    log = debug_log.getvalue()
    assert "KeyError, raised in:" in log
    assert "in fail" in log, "the frames are there"
    assert found([answer.text, log]) == []


async def test_key_that_is_wrong_missing_over_claiming_or_exhausted() -> None:
    keys = [{**KEYS[0], "requests_per_minute": 1, "min_ttft_ms": 100}]
    async with live(keys=keys) as antares:

        async def status(**headers: str) -> int:
            return (await antares.ask(**headers)).status_code

        assert await status(x_api_key=WRONG) == 401
        assert await status() == 401
        assert await status(**AUTH, x_slo_ttft_ms="99") == 403
        assert await status(**AUTH) == 429


def test_time_of_a_wrong_key_does_not_grow_with_its_prefix() -> None:
    """The prefix of a key says nothing about its digest, so it cannot lead the look-up anywhere."""
    prefixes = [hash_key(KEY[:length] + "x" * (len(KEY) - length)) for length in range(len(KEY))]
    common = [next((i for i, (a, b) in enumerate(zip(p, hash_key(KEY), strict=True)) if a != b), 64) for p in prefixes]
    assert max(common) <= 6, "digests of keys that share a prefix share none beyond chance"
