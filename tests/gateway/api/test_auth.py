"""API keys: authentication and rights."""

from __future__ import annotations

import hmac
from typing import Any

import pytest
from openai import AsyncOpenAI, AuthenticationError, PermissionDeniedError

from gateway.api import auth
from gateway.api.auth import ApiKey, KeyRing, hash_key
from gateway.api.errors import ApiError
from tests.fixtures.live_gateway import chat, live

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
KEYS = [
    {"sha256": hash_key(ALICE), "tenant": "alice", "default_class": "tight"},
    {"sha256": hash_key(BOB), "tenant": "bob", "allowed_classes": ["chat"], "min_ttft_ms": 100},
]


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", ALICE, f"Basic {ALICE}", f"Bearer {ALICE}x", "Bearer \xff"],
)
def test_key_ring_rejects_anything_but_a_known_bearer_key(header: str | None) -> None:
    ring = KeyRing([ApiKey("alice", "chat", hash_key(ALICE))], ApiKey("anonymous", "chat"))
    with pytest.raises(ApiError) as raised:
        ring.authenticate(header)
    assert raised.value.status == 401
    assert (b"www-authenticate", b"Bearer") in raised.value.headers
    assert ALICE not in raised.value.message


@pytest.mark.parametrize("header", [f"Bearer {ALICE}", f"bearer {ALICE}", f"BEARER   {ALICE} "])
def test_key_ring_accepts_any_case_and_spacing_of_the_scheme(header: str) -> None:
    ring = KeyRing([ApiKey("alice", "chat", hash_key(ALICE))], ApiKey("anonymous", "chat"))
    assert ring.authenticate(header).tenant == "alice"


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        (None, ALICE),
        (None, f" {ALICE}\t"),
        ("", ALICE),
        ("Bearer", ALICE),
        ("Basic dXNlcg==", ALICE),
        (f"Bearer {ALICE}", ""),
        (f"Bearer {ALICE}", "  "),
        (f"bearer {ALICE}", ALICE),
    ],
)
def test_key_ring_accepts_x_api_key(authorization: str | None, x_api_key: str) -> None:
    ring = KeyRing([ApiKey("alice", "chat", hash_key(ALICE))], ApiKey("anonymous", "chat"))
    assert ring.authenticate(authorization, x_api_key).tenant == "alice"


@pytest.mark.parametrize("x_api_key", ["", " ", "wrong", f"Bearer {ALICE}", f"{ALICE}, {ALICE}", "\xff"])
def test_key_ring_rejects_an_unknown_x_api_key(x_api_key: str) -> None:
    ring = KeyRing([ApiKey("alice", "chat", hash_key(ALICE))], ApiKey("anonymous", "chat"))
    with pytest.raises(ApiError) as raised:
        ring.authenticate(None, x_api_key)
    assert (raised.value.status, "x-api-key" in raised.value.message) == (401, True)


@pytest.mark.parametrize("other", [BOB, "unknown"])
def test_key_ring_rejects_two_different_keys(other: str) -> None:
    ring = KeyRing([ApiKey("a", "chat", hash_key(ALICE)), ApiKey("b", "chat", hash_key(BOB))], ApiKey("-", "chat"))
    with pytest.raises(ApiError, match="different API keys") as raised:
        ring.authenticate(f"Bearer {ALICE}", other)
    assert raised.value.status == 401
    assert ALICE not in raised.value.message


def test_key_ring_without_keys_returns_the_anonymous_key() -> None:
    assert KeyRing([], ApiKey("anonymous", "chat")).authenticate("Bearer whatever").tenant == "anonymous"


def test_key_ring_makes_one_constant_time_comparison_among_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    compare = hmac.compare_digest

    def spy(presented: str, known: str) -> bool:
        compared.append(known)
        return compare(presented, known)

    monkeypatch.setattr(auth.hmac, "compare_digest", spy)
    ring = KeyRing([ApiKey(f"t{i}", "chat", hash_key(f"{ALICE}{i}")) for i in range(1000)], ApiKey("-", "chat"))
    assert ring.authenticate(f"Bearer {ALICE}7").tenant == "t7"
    assert compared == [hash_key(f"{ALICE}7")]
    with pytest.raises(ApiError):
        ring.authenticate(f"Bearer {ALICE}")
    assert len(compared) == 1, "an unknown key is compared with none"


def test_key_ring_rejects_a_key_from_its_expiry_on() -> None:
    now = [99.9]
    ring = KeyRing([ApiKey("alice", "chat", hash_key(ALICE), expires_s=100.0)], ApiKey("-", "chat"), lambda: now[0])
    assert ring.authenticate(f"Bearer {ALICE}").tenant == "alice"
    now[0] = 100.0
    with pytest.raises(ApiError, match="expired") as raised:
        ring.authenticate(f"Bearer {ALICE}")
    assert raised.value.status == 401
    with pytest.raises(ApiError, match="unknown"):
        ring.authenticate("Bearer wrong")


async def test_openai_client_gets_401_403_and_200() -> None:
    async with live(keys=KEYS) as antares:

        async def ask(key: str, **headers: str) -> Any:
            client = AsyncOpenAI(base_url=f"{antares.url}/v1", api_key=key, max_retries=0)
            return await client.chat.completions.create(**chat(), extra_headers=headers)

        with pytest.raises(AuthenticationError):
            await ask("unknown-key")
        with pytest.raises(PermissionDeniedError):
            await ask(BOB, **{"x-slo-class": "tight"})
        with pytest.raises(PermissionDeniedError):
            await ask(BOB, **{"x-slo-ttft-ms": "99"})
        assert (await ask(BOB)).choices[0].message.content


async def test_request_gets_default_class_and_tenant_of_its_key() -> None:
    async with live(keys=KEYS) as antares:
        answer = await antares.ask(authorization=f"Bearer {ALICE}", x_slo_report="1")
        assert answer.json()["antares"]["slo_class"] == "tight"
        assert 'tenant="alice"' in (await antares.http.get("/metrics")).text


async def test_v1_routes_require_a_key_and_operator_routes_do_not() -> None:
    async with live(keys=KEYS) as antares:
        for path in ("/v1/models", "/v1/responses/resp_1"):
            assert (await antares.http.get(path)).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/status"):
            assert (await antares.http.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/embeddings"])
async def test_x_api_key_is_accepted_on_every_route(path: str) -> None:
    async with live(keys=KEYS) as antares:
        body = {**chat(), "prompt": "a", "max_tokens": 1}
        assert (await antares.ask(body, path, x_api_key=BOB)).status_code != 401
        assert (await antares.ask(body, path, x_api_key=BOB, authorization=f"Bearer {ALICE}")).status_code == 401


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
async def test_credentials_and_guarded_headers_are_not_sent_to_the_engine(path: str) -> None:
    async with live(keys=KEYS) as antares:
        seen: list[bytes] = []
        inner = antares.engine.app

        async def spy(scope: Any, receive: Any, send: Any) -> None:
            seen.extend(name for name, _ in scope["headers"])
            await inner(scope, receive, send)

        antares.engine.stub = spy
        dropped = {
            **{"x-api-key": ALICE, "api-key": "other", "cookie": "a=b", "proxy-authorization": "Basic eA=="},
            **{
                "x-vllm-priority": "-9",
                "x-data-parallel-rank": "1",
                "x-session-id": "s",
                "origin": "https://a.example",
            },
        }
        await antares.http.post(path, json=chat(), headers={**dropped, "x-mine": "kept"})
        assert b"x-mine" in seen
        assert not {name.encode() for name in dropped} & set(seen)


async def test_client_key_is_not_sent_to_the_engine() -> None:
    async with live(keys=KEYS) as antares:
        seen: list[bytes] = []
        inner = antares.engine.app

        async def spy(scope: Any, receive: Any, send: Any) -> None:
            seen.extend(name for name, _ in scope["headers"])
            await inner(scope, receive, send)

        antares.engine.stub = spy
        assert (await antares.ask(authorization=f"Bearer {ALICE}")).status_code == 200
        assert b"authorization" not in seen


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"])
async def test_expired_key_gets_401_on_every_route(path: str) -> None:
    expired = [{"sha256": hash_key(ALICE), "tenant": "alice", "expires": "2020-01-01T00:00:00Z"}]
    async with live(keys=expired) as antares:
        answer = await antares.http.post(path, json=chat(), headers={"authorization": f"Bearer {ALICE}"})
    assert (answer.status_code, "expired" in answer.json()["error"]["message"]) == (401, True)
    assert ALICE not in answer.text
