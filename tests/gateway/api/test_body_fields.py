"""Body fields that reach beyond their own request."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from gateway.api.auth import ApiKey, hash_key
from gateway.api.body_fields import GUARDED_FIELDS, FieldGuard
from gateway.api.errors import ApiError
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, gateway_config, live

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
KEYS = [
    {"sha256": hash_key(ALICE), "tenant": "alice"},
    {"sha256": hash_key(BOB), "tenant": "bob", "allowed_fields": ["priority", "kv_transfer_params"]},
]
TOUCHING: dict[str, Any] = {
    "priority": -1000,
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"},
    "ec_transfer_params": {"a": 1},
    "data_parallel_rank": 3,
    "request_id": "another-request",
    "session_id": "another-session",
    "rid": "another-request",
    "bootstrap_host": "10.0.0.1",
    "custom_logit_processor": "gASV",
    "logits_processors": ["os.system"],
    "lora_path": "/etc",
    "nvext": {"agent_hints": {"priority": 9}},
}
PATHS = [CHAT, TEXT, "/v1/embeddings", "/v1/responses", "/v1/messages"]


async def sent(antares: Live, path: str, fields: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    """The body that the engine gets for a body with ``fields``."""
    antares.echo_bodies()
    headers = {} if key is None else {"x_api_key": key}
    answer = await antares.ask({**chat(), "prompt": "a", "input": "a", **fields}, path, **headers)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize("name", TOUCHING)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_guarded_field_is_removed_by_default(antares: Live, path: str, name: str, stream: bool) -> None:
    body = await sent(antares, path, {name: TOUCHING[name], "stream": stream, "temperature": 0.5})
    assert name not in body
    assert body["temperature"] == 0.5


async def test_removal_is_logged_at_debug_level_without_the_value(
    antares: Live, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "antares.body_fields"):
        await sent(antares, CHAT, {"request_id": "some-secret"})
    assert "request_id" in caplog.text
    assert "some-secret" not in caplog.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", sorted(TOUCHING.keys() - {"nvext"}))
async def test_guarded_field_gets_400_if_so_configured(path: str, name: str) -> None:
    async with live(server={"body_fields": {"on_denied": "reject"}}) as antares:
        answer = await antares.ask({**chat(), "prompt": "a", name: TOUCHING[name]}, path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        assert antares.gateway.ledger.open_count == 0


@pytest.mark.parametrize("path", PATHS)
async def test_allowed_field_reaches_the_engine(path: str) -> None:
    async with live(server={"body_fields": {"allow": ["priority"], "on_denied": "reject"}}) as antares:
        assert (await sent(antares, path, {"priority": 5}))["priority"] == 5


async def test_fields_of_a_key_replace_those_of_the_server() -> None:
    async with live(keys=KEYS, server={"body_fields": {"allow": ["request_id"]}}) as antares:
        fields = {"priority": 1, "request_id": "mine"}
        assert "priority" not in await sent(antares, CHAT, fields, ALICE)
        assert "request_id" in await sent(antares, CHAT, fields, ALICE)
        assert "priority" in await sent(antares, CHAT, fields, BOB)
        assert "request_id" not in await sent(antares, CHAT, fields, BOB)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["prompt_embeds", "input_embeds"])
async def test_denied_prompt_is_never_removed_silently(antares: Live, path: str, field: str) -> None:
    answer = await antares.ask({**chat(), "prompt": "a", field: "gASV"}, path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("path", PATHS)
async def test_members_of_xargs_are_guarded_too(antares: Live, path: str) -> None:
    xargs = {"session_id": "a", "kv_transfer_params": "x", "kv_cache_report_mode": "y", "mine": 1}
    assert (await sent(antares, path, {"vllm_xargs": xargs}))["vllm_xargs"]["mine"] == 1
    assert not GUARDED_FIELDS & (await sent(antares, path, {"vllm_xargs": xargs}))["vllm_xargs"].keys()


@pytest.mark.parametrize("path", PATHS)
async def test_cache_salt_is_scoped_by_tenant(path: str) -> None:
    async with live(keys=[KEYS[0]]) as antares:
        assert (await sent(antares, path, {"cache_salt": "s"}, ALICE))["cache_salt"] == "alice:s"
        assert (await sent(antares, path, {"cache_salt": None}, ALICE))["cache_salt"] is None
        assert "cache_salt" not in await sent(antares, path, {}, ALICE)


@pytest.mark.parametrize("path", PATHS)
async def test_isolated_prefixes_have_a_salt_of_their_tenant(path: str) -> None:
    async with live(keys=KEYS, server={"body_fields": {"prefix_isolation": True, "allow": ["cache_salt"]}}) as antares:
        several: list[dict[str, Any]] = [{}, {"cache_salt": None}, {"request_id": "removed"}]
        for fields in several:
            assert (await sent(antares, path, fields, ALICE))["cache_salt"] == "alice:"
        assert (await sent(antares, path, {"cache_salt": "s"}, ALICE))["cache_salt"] == "alice:s"
        assert (await sent(antares, path, {}, BOB))["cache_salt"] == "bob:"


def test_no_salt_of_a_client_equals_that_of_a_tenant() -> None:
    guard = FieldGuard(isolates_prefixes=True)

    def salt(tenant: str, **document: Any) -> Any:
        guard.apply(document, ApiKey(tenant, "chat", "digest", allowed_fields=frozenset({"cache_salt"})))
        return document["cache_salt"]

    found = [salt("a"), salt("b"), salt("b", cache_salt="a:"), salt("a", cache_salt="b:"), salt("a", cache_salt=":")]
    assert len(set(found)) == len(found)


def test_isolation_needs_tenants() -> None:
    document: dict[str, Any] = {"prompt": "a"}
    assert not FieldGuard(isolates_prefixes=True).apply(document, ApiKey("anonymous", "chat", ""))
    assert document == {"prompt": "a"}


async def test_cache_salt_without_keys_passes_unchanged(antares: Live) -> None:
    assert (await sent(antares, CHAT, {"cache_salt": "bob:s"}))["cache_salt"] == "bob:s"


@pytest.mark.parametrize("salt", ["", 5, True, ["a"], {"a": 1}])
async def test_malformed_cache_salt_gets_400(salt: Any) -> None:
    async with live(keys=KEYS[:1]) as antares:
        answer = await antares.ask(chat(cache_salt=salt), x_api_key=ALICE)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def test_tenants_cannot_forge_the_salt_of_another() -> None:
    def scoped(tenant: str, salt: str) -> Any:
        document = {"cache_salt": salt}
        FieldGuard().apply(document, ApiKey(tenant, "chat", "digest", allowed_fields=frozenset({"cache_salt"})))
        return document["cache_salt"]

    assert len({scoped("a", "b:c"), scoped("a", "c"), scoped("b", "c"), scoped("b", "a:c"), scoped("a", "a:c")}) == 5


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (
            "multipart/form-data; boundary=xx",
            b'--xx\r\ncontent-disposition: form-data; name="priority"\r\n\r\n1\r\n--xx--',
        ),
        (
            "multipart/form-data; boundary=xx",
            b"--xx\r\nContent-Disposition: form-data; NAME=priority\r\n\r\n1\r\n--xx--",
        ),
        ("application/x-www-form-urlencoded", b"prompt=a&priority=1"),
        ("application/x-www-form-urlencoded", b"prompt=a&prior%69ty=1"),
        ("application/x-www-form-urlencoded; charset=utf-8", b"vllm_xargs=1"),
        ("application/x-www-form-urlencoded", b"&".join(b"a=1" for _ in range(2000))),
    ],
)
async def test_form_with_a_denied_field_gets_400(antares: Live, content_type: str, body: bytes) -> None:
    antares.echo_bodies()
    headers = {"content-type": content_type}
    answer = await antares.http.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert answer.status_code == 400, answer.text


async def test_form_without_denied_fields_passes(antares: Live) -> None:
    antares.echo_bodies()
    body = b"prompt=priority&language=en"
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = await antares.http.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert (answer.status_code, answer.content) == (200, body)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (TEXT, {"best_of": 400}),
        (TEXT, {"best_of": 300, "n": 1}),
        (CHAT, {"best_of": 400}),
        (CHAT, {"n": 400, "use_beam_search": True}),
        (TEXT, {"best_of": 100, "prompt": ["a", "b", "c"]}),
    ],
)
async def test_best_of_and_beams_count_as_sequences(antares: Live, path: str, fields: dict[str, Any]) -> None:
    answer = await antares.ask({**chat(), "prompt": "a", **fields}, path)
    expected = "best_of" if fields.get("best_of", 0) > 256 else "n"
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, expected)


async def test_best_of_beyond_the_engines_batch_gets_400(antares: Live) -> None:
    antares.engine.state.max_num_seqs = 8
    answer = await antares.ask({"prompt": "a", "best_of": 9}, TEXT)
    assert (answer.status_code, "9" in answer.json()["error"]["message"]) == (400, True)
    assert (await antares.ask({"prompt": "a", "best_of": 8, "max_tokens": 1}, TEXT)).status_code == 200


@pytest.mark.parametrize("best_of", [0, -1, 1.5, "2", True])
async def test_malformed_best_of_gets_400(antares: Live, best_of: Any) -> None:
    answer = await antares.ask({"prompt": "a", "best_of": best_of}, TEXT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "best_of")


@pytest.mark.parametrize("names", [["temperature"], ["prioritiy"], [""], ["antares_gate"]])
def test_only_guarded_fields_can_be_allowed(names: list[str]) -> None:
    with pytest.raises(ValueError, match="guarded fields: "):
        gateway_config(server={"body_fields": {"allow": names}})
    with pytest.raises(ValueError, match="guarded fields: "):
        gateway_config(keys=[{**KEYS[0], "allowed_fields": names}])


def test_body_without_guarded_fields_is_not_changed() -> None:
    document = chat(temperature=1, vllm_xargs={"mine": 1})
    before = dict(document)
    assert FieldGuard(rejects=True).apply(document, ApiKey("a", "chat")) is False
    assert document == before


def test_guard_names_the_place_of_a_denied_member() -> None:
    with pytest.raises(ApiError, match=r"vllm_xargs\.session_id"):
        FieldGuard(rejects=True).apply({"vllm_xargs": {"session_id": "a"}}, ApiKey("a", "chat"))
