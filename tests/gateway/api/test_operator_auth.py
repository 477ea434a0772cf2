"""Keys for the operator's pages: where they are required, and the ways to send them."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway.api.auth import hash_key
from gateway.cli import app
from tests.fixtures import prometheus
from tests.fixtures.live_gateway import gateway_config, live
from tests.fixtures.live_server import HANG_S

OPERATOR, TENANT = "operator-0123456789abcdef", "tenant-0123456789abcdef"
KEYS = [
    {"sha256": hash_key(OPERATOR), "tenant": "ops", "operator": True},
    {"sha256": hash_key(TENANT), "tenant": "a"},
]
PAGES = ("/metrics", "/status", "/dashboard", "/dashboard/events", "/docs", "/openapi.json")
REACHABLE, GUARDED = {"host": "0.0.0.0"}, {"operator_auth": True}


def basic(user: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize("server", [REACHABLE, GUARDED])
async def test_pages_need_the_key_of_an_operator(server: dict[str, Any]) -> None:
    async with live(server=server, keys=KEYS) as antares:
        for path in PAGES:
            missing = await antares.http.get(path)
            assert missing.status_code == 401
            assert missing.headers["www-authenticate"].startswith("Basic ")
            assert "antares key new --operator" in missing.json()["error"]["message"]
            assert (await antares.http.head(path)).status_code == 401
            tenants = await antares.http.get(path, headers={"x-api-key": TENANT})
            assert (tenants.status_code, tenants.json()["error"]["code"]) == (403, "not_an_operator")
        for path in ("/health", "/ready"):
            assert (await antares.http.get(path)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {OPERATOR}"},
        {"x-api-key": OPERATOR},
        basic("", OPERATOR),
        basic("any:one"[:3], OPERATOR),
    ],
)
async def test_key_of_an_operator_opens_every_page(headers: dict[str, str]) -> None:
    async with live(server=GUARDED, keys=KEYS) as antares:
        for path in PAGES:
            async with antares.http.stream("GET", path, headers=headers) as answer:
                assert answer.status_code == 200
                assert "www-authenticate" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (basic("any", "wrong"), 401),
        (basic("any", TENANT), 403),
        ({"authorization": "Basic !!!"}, 401),
        ({"authorization": "Basic"}, 401),
        ({"authorization": "Basic " + base64.b64encode(b"\xff\xfe").decode()}, 401),
        ({"authorization": "Basic " + base64.b64encode(OPERATOR.encode()).decode()}, 401),
        ({"authorization": f"Digest {OPERATOR}"}, 401),
        ({"authorization": f"Bearer {OPERATOR[:-1]}"}, 401),
        ({**basic("any", OPERATOR), "x-api-key": TENANT}, 401),
    ],
)
async def test_wrong_credentials_open_nothing(headers: dict[str, str], status: int) -> None:
    async with live(server=GUARDED, keys=KEYS) as antares:
        answer = await antares.http.get("/status", headers=headers)
        assert answer.status_code == status
        assert OPERATOR not in answer.text


async def test_basic_does_not_reload() -> None:
    async with live(server=GUARDED, keys=KEYS) as antares:
        # A browser sends it for pages of other sites too.
        assert (await antares.http.post("/reload", headers=basic("any", OPERATOR))).status_code == 401
        assert (await antares.http.post("/reload", headers={"x-api-key": OPERATOR})).status_code == 422


@pytest.mark.parametrize(
    ("config", "required"),
    [
        ({}, False),
        ({"keys": KEYS}, False),
        ({"keys": KEYS, "server": {"operator_auth": False}}, False),
        ({"keys": KEYS, "server": GUARDED}, True),
        ({"keys": KEYS, "server": REACHABLE}, True),
        ({"keys_file": "keys.json", "server": {**REACHABLE, "allow_anonymous": True}}, True),
        ({"server": {**REACHABLE, "allow_anonymous": True}}, False),
    ],
)
def test_key_is_required_where_other_machines_can_reach_the_pages(config: dict[str, Any], required: bool) -> None:
    assert gateway_config(**config).operator_key_required is required


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"keys": KEYS, "server": {**REACHABLE, "operator_auth": False}}, "remove this line"),
        ({"server": GUARDED}, "no keys are configured"),
    ],
)
def test_setting_that_cannot_be_kept_is_a_mistake(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"server.operator_auth: .*{says}"):
        gateway_config(**config)


def test_required_key_that_no_operator_has_is_cautioned_of() -> None:
    assert "antares key new --operator" in gateway_config(keys=KEYS[1:], server=REACHABLE).cautions()[0]
    assert gateway_config(keys=KEYS, server=REACHABLE).cautions() == []


async def test_reload_changes_the_setting() -> None:
    async with live(keys=KEYS) as antares:
        assert antares.gateway.reload(gateway_config(keys=KEYS, server=GUARDED)).changed == ["server.operator_auth"]
        assert (await antares.http.get("/metrics")).status_code == 401


@pytest.mark.parametrize(
    ("env", "words", "code"),
    [
        ({"ANTARES_OPERATOR_KEY": OPERATOR}, [], 0),
        ({"ANTARES_API_KEY": OPERATOR}, [], 0),
        ({"ANTARES_KEY": OPERATOR}, [], 0),
        ({"ANTARES_OPERATOR_KEY": OPERATOR, "ANTARES_API_KEY": TENANT}, [], 0),
        ({"MINE": OPERATOR, "ANTARES_API_KEY": TENANT}, ["--key-env", "MINE"], 0),
        ({}, ["--key-env", "UNSET"], 2),
        ({}, [], 1),
        ({"ANTARES_API_KEY": TENANT}, [], 1),
    ],
)
async def test_commands_send_the_key(env: dict[str, str], words: list[str], code: int) -> None:
    unset = dict.fromkeys(("ANTARES_OPERATOR_KEY", "ANTARES_API_KEY", "ANTARES_KEY", "MINE"))

    def run(*command: str) -> Result:
        return CliRunner(env={**unset, **env}).invoke(app, [*command, *words])

    async with live(server=GUARDED, keys=KEYS) as antares:
        await antares.ask(x_api_key=TENANT, x_request_id="mine")
        top = await asyncio.to_thread(run, "top", "--once", "--url", antares.url)
        assert top.exit_code == code, top.output
        if code == 1:
            assert "ANTARES_OPERATOR_KEY" in top.output
        reload = await asyncio.to_thread(run, "config", "reload", "--url", antares.url)
        # Without a file nothing can be reloaded: 1. Without the key, nothing was tried: 2.
        assert reload.exit_code == (1 if code == 0 else 2)
        if env.get("ANTARES_API_KEY") != TENANT or code == 0:
            explained = await asyncio.to_thread(run, "explain", "mine", "--url", antares.url)
            assert explained.exit_code == code


@pytest.mark.process
@pytest.mark.parametrize(("key", "health"), [(OPERATOR, "up"), (TENANT, "down")])
async def test_deployed_prometheus_scrapes_with_the_key_of_an_operator(tmp_path: Path, key: str, health: str) -> None:
    async with (
        live(server=GUARDED, keys=KEYS) as antares,
        prometheus.started(tmp_path, {"antares": antares.url}, operator_key=key, interval_s=0.2) as scraper,
    ):
        async with asyncio.timeout(HANG_S):
            while (await scraper.targets()).get("antares") != health:
                await asyncio.sleep(0.1)


async def test_feed_of_a_revoked_operator_ends() -> None:
    async with live(server=GUARDED, keys=KEYS) as antares:
        antares.gateway.live.start()
        async with antares.http.stream("GET", "/dashboard/events", headers={"x-api-key": OPERATOR}) as feed:
            lines = feed.aiter_lines()
            await anext(lines)
            antares.gateway.reload(gateway_config(server=GUARDED, keys=KEYS[1:]))
            async with asyncio.timeout(HANG_S):
                async for _ in lines:
                    pass
        assert (await antares.http.get("/dashboard/events", headers={"x-api-key": OPERATOR})).status_code == 401


async def test_client_of_a_local_proxy_is_not_local() -> None:
    async with live() as antares:
        forwarded = await antares.http.post("/reload", headers={"x-forwarded-for": "203.0.113.9"})
        assert (forwarded.status_code, forwarded.json()["error"]["code"]) == (403, "not_an_operator")
        assert (await antares.http.post("/reload")).status_code != 403
