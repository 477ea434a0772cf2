"""Cross-origin requests of browsers."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.auth import hash_key
from gateway.api.cors import Cors
from tests.fixtures.live_gateway import CHAT, Live, chat, gateway_config, live

KEY = "key-0123456789abcdef"
KEYS = [{"sha256": hash_key(KEY), "tenant": "a"}]
ORIGIN = "https://app.example"
ALLOWED = {"cors": {"allow_origins": [ORIGIN, "http://localhost:3000"]}}
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang,x-slo-class",
}


async def test_preflight_needs_no_key() -> None:
    async with live(keys=KEYS, server=ALLOWED) as antares:
        answer = await antares.http.options(CHAT, headers=PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "x-slo-class" in answer.headers["access-control-allow-headers"]
        assert answer.headers["access-control-max-age"] == "600"
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    "change",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ORIGIN + ".evil.example"},
        {"origin": ORIGIN.upper()},
        {"access-control-request-method": "TRACE"},
    ],
)
async def test_preflight_of_another_origin_or_method_is_denied(change: dict[str, str]) -> None:
    async with live(keys=KEYS, server=ALLOWED) as antares:
        answer = await antares.http.options(CHAT, headers={**PREFLIGHT, **change})
        assert answer.status_code == 400


async def test_listed_request_headers_limit_the_preflight() -> None:
    cors = {"allow_origins": [ORIGIN], "allow_headers": ["authorization"], "max_age_s": 5}
    async with live(server={"cors": cors}) as antares:
        denied = await antares.http.options(CHAT, headers=PREFLIGHT)
        asked = {**PREFLIGHT, "access-control-request-headers": "Authorization, Content-Type"}
        allowed = await antares.http.options(CHAT, headers=asked)
        assert (denied.status_code, allowed.status_code) == (400, 200)
        assert allowed.headers["access-control-max-age"] == "5"


async def answers(antares: Live) -> dict[str, Any]:
    """Answers of the gateway and of the engine to a page at `ORIGIN`, by kind."""
    headers = {"origin": ORIGIN, "authorization": f"Bearer {KEY}"}
    post, get = antares.http.post, antares.http.get
    impossible = {**headers, "x-slo-tpot-ms": "0.001"}
    return {
        "ok": await post(CHAT, json=chat(), headers=headers),
        "stream": await post(CHAT, json=chat(stream=True), headers=headers),
        "models": await get("/v1/models", headers=headers),
        "429": await post(CHAT, json=chat(), headers=impossible),
        "401": await post(CHAT, json=chat(), headers={"origin": ORIGIN}),
        "400": await post(CHAT, content=b"{", headers=headers),
        "404": await post("/chat/completions", json=chat(), headers=headers),
        "405": await get(CHAT, headers=headers),
    }


async def test_every_answer_carries_cors_headers() -> None:
    async with live(keys=KEYS, server=ALLOWED) as antares:
        for kind, answer in (await answers(antares)).items():
            assert not kind.isdigit() or answer.status_code == int(kind)
            assert answer.headers["access-control-allow-origin"] == ORIGIN, kind
            exposed = answer.headers["access-control-expose-headers"]
            assert {"x-request-id", "retry-after", "x-antares-ttft-ms"} <= set(exposed.split(", "))
            assert "origin" in answer.headers["vary"].lower()


async def test_any_origin_is_answered_with_a_star_and_without_credentials() -> None:
    async with live(keys=KEYS, server={"cors": {"allow_origins": ["*"]}}) as antares:
        for answer in (await answers(antares)).values():
            assert answer.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("path", ["/metrics", "/status", "/health"])
async def test_operator_routes_stay_closed_to_other_origins(path: str) -> None:
    async with live(server={"cors": {"allow_origins": ["*"]}}) as antares:
        answer = await antares.http.get(path, headers={"origin": ORIGIN})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/embeddings"])
async def test_without_configuration_options_gets_405_and_no_cors_headers(path: str) -> None:
    async with live(keys=KEYS) as antares:
        answer = await antares.http.options(path, headers=PREFLIGHT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
@pytest.mark.parametrize("server", [{}, ALLOWED])
async def test_rules_of_the_engine_are_not_passed_on(server: dict[str, Any], path: str) -> None:
    async with live(server=server) as antares:

        async def open_engine(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"Access-Control-Allow-Origin", b"*"), (b"access-control-allow-credentials", b"true")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"{}"})

        antares.engine.stub = open_engine
        method = "POST" if path == CHAT else "GET"
        body = chat() if path == CHAT else None
        answer = await antares.http.request(method, path, json=body, headers={"origin": "https://evil.example"})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-credentials" not in answer.headers


async def test_request_without_origin_gets_the_servers_own_send() -> None:
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.append(send)

    async def send(message: Any) -> None: ...

    await Cors(app, ["*"], ["*"], 1)({"type": "http", "method": "POST", "headers": []}, send, send)  # type: ignore[arg-type]
    assert received == [send]


@pytest.mark.parametrize(
    "origins",
    [[], ["app.example"], [ORIGIN + "/"], [ORIGIN + "/path"], ["HTTPS://A"], ["*", ORIGIN], ["https://*.example"]],
)
def test_malformed_origins_are_mistakes(origins: list[str]) -> None:
    with pytest.raises(ValueError, match="allow_origins"):
        gateway_config(server={"cors": {"allow_origins": origins}})


@pytest.mark.parametrize(
    "origin", ["*", "null", "http://localhost:3000", "tauri://localhost", "chrome-extension://abc"]
)
def test_origins_of_browsers_and_apps_are_valid(origin: str) -> None:
    assert gateway_config(server={"cors": {"allow_origins": [origin]}}).server.cors is not None
