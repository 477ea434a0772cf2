"""`antares key`, and keys that a running gateway takes up and refuses as its keys file changes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.api.auth import hash_key, key_id
from gateway.config.file import load
from gateway.key_commands import app
from gateway.reload import Reloader
from tests.fixtures.live_gateway import CHAT, Live, chat, live
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.served_process import served

CONFIG = """\
engines: [{kind: simulated}]
predictor: {enabled: false}
classes: {chat: {}, batch: {}}
default_class: chat
keys_file: keys.json
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "gateway.yaml"
    file.write_text(CONFIG)
    return file


def run(config: Path, command: str, *words: str) -> Result:
    return CliRunner().invoke(app, [command, "--config", str(config), *words])


def new_key(config: Path, tenant: str = "alice", *words: str) -> str:
    """Return a new key."""
    result = run(config, "new", "--tenant", tenant, *words)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_new_prints_a_random_key_once_and_stores_its_digest(config: Path) -> None:
    keys = [new_key(config), new_key(config, "bob", "--allow-class", "chat", "--expires", "30d", "--operator")]
    assert len({*keys}) == 2
    assert all(len(key) == len("antares-") + 48 for key in keys)
    stored = (config.parent / "keys.json").read_text()
    assert all(hash_key(key) in stored and key not in stored for key in keys)
    assert oct((config.parent / "keys.json").stat().st_mode & 0o777) == "0o600"
    bob = load(config).api_keys()[1]
    assert (bob.tenant, bob.allowed_classes, bob.operator) == ("bob", {"chat"}, True)
    assert bob.expires_s is not None


def test_list_shows_ids_and_rights_but_no_key(config: Path) -> None:
    key = new_key(config, "alice", "--min-ttft-ms", "300", "--expires", "2020-01-01", "--weight", "2")
    config.write_text(CONFIG + f"keys: [{{sha256: {hash_key('bobs')}, tenant: bob}}]\n")
    text = run(config, "list").stdout
    rows = json.loads(run(config, "list", "--json").stdout)
    assert {row["tenant"]: (row["id"], row["file"], row["expired"]) for row in rows} == {
        "bob": (key_id(hash_key("bobs")), "configuration", False),
        "alice": (key_id(hash_key(key)), "keys file", True),
    }
    for part in (key_id(hash_key(key)), "alice", "min_ttft_ms=300", "weight=2", "(expired)", "never"):
        assert part in text
    assert key not in text
    assert hash_key(key) not in text


def test_revoke_removes_a_key_by_id_or_all_of_a_tenant(config: Path) -> None:
    first, _, _ = new_key(config), new_key(config), new_key(config, "bob")
    assert "revoked 1 key" in run(config, "revoke", key_id(hash_key(first))).stdout
    assert [key.tenant for key in load(config).api_keys()] == ["alice", "bob"]
    assert run(config, "revoke", "--tenant", "alice").exit_code == 0
    assert [key.tenant for key in load(config).api_keys()] == ["bob"]


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("new", ["--tenant", "a b"], "tenant"),
        ("new", ["--tenant", "a", "--allow-class", "foo"], "no class is called 'foo'"),
        ("new", ["--tenant", "a", "--allow-class", "batch"], "default class 'chat' is not in allowed_classes"),
        ("new", ["--tenant", "a", "--expires", "soon"], "30d"),
        ("new", ["--tenant", "a", "--expires", "99999999d"], "30d"),
        ("new", ["--tenant", "alice", "--weight", "3"], "another weight"),
        ("revoke", ["--tenant", "nobody"], "antares key list"),
        ("revoke", ["123456789012"], "antares key list"),
        ("revoke", ["--tenant", "conf"], "under `keys:`"),
        ("revoke", [], "either"),
        ("revoke", ["123456789012", "--tenant", "alice"], "either"),
    ],
)
def test_wrong_option_changes_nothing_and_says_why(config: Path, command: str, words: list[str], says: str) -> None:
    new_key(config)
    config.write_text(CONFIG + f"keys: [{{sha256: {hash_key('conf')}, tenant: conf}}]\n")
    before = (config.parent / "keys.json").read_bytes()
    result = run(config, command, *words)
    assert result.exit_code != 0
    assert says in result.output
    assert (config.parent / "keys.json").read_bytes() == before


def test_further_key_of_a_tenant_inherits_what_its_keys_share(config: Path) -> None:
    new_key(config, "alice", "--weight", "3")
    new_key(config, "alice")
    assert [key.weight for key in load(config).api_keys()] == [3, 3]


def test_configuration_without_keys_file_says_what_to_add(config: Path) -> None:
    config.write_text(CONFIG.replace("keys_file: keys.json\n", ""))
    assert "keys_file: keys.json" in run(config, "new", "--tenant", "a").output


@asynccontextmanager
async def watched(config: Path) -> AsyncIterator[Live]:
    """Serve a gateway that follows the keys file of ``config``."""
    loaded = load(config)
    async with live(**loaded.model_dump(exclude={"engines"})) as antares:
        reloader = Reloader(antares.gateway, lambda: load(config), file=config)
        reloader.watch_keys()
        try:
            yield antares
        finally:
            await reloader.stop()


async def until(antares: Live, key: str, status: int) -> None:
    """Wait until a request with ``key`` gets ``status``."""
    async with asyncio.timeout(HANG_S):
        while (await antares.ask(x_api_key=key)).status_code != status:
            await asyncio.sleep(0.05)


async def test_new_key_works_and_revoked_key_fails_without_a_signal(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.reload.KEYS_EVERY_S", 0.02)
    first = await asyncio.to_thread(new_key, config)
    async with watched(config) as antares:
        assert (await antares.ask(x_api_key=first)).status_code == 200
        second = await asyncio.to_thread(new_key, config, "bob")
        await until(antares, second, 200)
        await asyncio.to_thread(run, config, "revoke", "--tenant", "alice")
        await until(antares, first, 401)
        assert (await antares.ask(x_api_key=second)).status_code == 200
        await asyncio.to_thread(run, config, "revoke", "--tenant", "bob")
        await until(antares, second, 401)
        assert (await antares.ask()).status_code == 401, "revoking the last key opens nothing"


@pytest.mark.parametrize("content", ["{", '{"keys": [{"tenant": "x"}]}', None])
async def test_bad_keys_file_changes_nothing_and_is_logged_with_its_place(
    config: Path, content: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.reload.KEYS_EVERY_S", 0.02)
    caplog.set_level(logging.INFO, "antares")
    key = await asyncio.to_thread(new_key, config)
    file = config.parent / "keys.json"
    good = file.read_text()
    async with watched(config) as antares:
        await asyncio.sleep(0.1)
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        await eventually(lambda: "nothing changed" in caplog.text)
        assert f"{file}: line 1" in caplog.text
        assert (await antares.ask(x_api_key=key)).status_code == 200
        caplog.clear()
        await asyncio.sleep(0.2)
        assert "nothing changed" not in caplog.text, "the same mistake is logged once"
        file.write_text(good.replace("alice", "carol"))
        await eventually(lambda: "1 keys are valid now" in caplog.text)
        answer = await antares.ask(x_api_key=key)
        assert (answer.status_code, antares.gateway.config.api_keys()[0].tenant) == (200, "carol")


async def test_change_of_the_keys_file_leaves_the_rest_of_the_configuration(config: Path) -> None:
    first = await asyncio.to_thread(new_key, config)
    async with watched(config) as antares:
        await asyncio.to_thread(config.write_text, CONFIG.replace("batch: {}", "other: {}"))
        second = await asyncio.to_thread(new_key, config, "bob")
        await until(antares, second, 200)
        assert set(antares.gateway.config.classes) == {"chat", "batch"}
        assert (await antares.ask(x_api_key=first)).status_code == 200


async def test_reload_reads_the_keys_file_too(config: Path) -> None:
    await asyncio.to_thread(new_key, config)
    loaded = load(config)
    async with live(**loaded.model_dump(exclude={"engines"})) as antares:
        second = await asyncio.to_thread(new_key, config, "bob")
        report = await Reloader(antares.gateway, lambda: load(config), file=config).reload()
        assert report["changed"] == ["keys_file"]
        assert (await antares.ask(x_api_key=second)).status_code == 200


@pytest.mark.process
async def test_newcomer_makes_a_limited_key_sees_its_usage_and_revokes_it(tmp_path: Path) -> None:
    config = tmp_path / "antares.yaml"
    text = CONFIG + "server: {port: 0, drain_s: 1}\n"
    config.write_text(text)
    key = await asyncio.to_thread(new_key, config, "alice", "--requests-per-minute", "2", "--max-concurrent", "4")
    async with served(tmp_path, text) as (process, http):
        auth = {"authorization": f"Bearer {key}"}
        statuses = [(await http.post(CHAT, json=chat(), headers=auth)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        usage = (await http.get("/status")).json()["usage"]["alice"]
        assert usage["requests"] == {"finished": 2, "rate_limited": 1}
        assert usage["limits"]["max_concurrent"] == {"limit": 4, "remaining": 4}
        await asyncio.to_thread(run, config, "revoke", "--tenant", "alice")
        async with asyncio.timeout(HANG_S):
            while (await http.get("/v1/models", headers=auth)).status_code != 401:
                await asyncio.sleep(0.05)
        process.terminate()
        await process.wait()


def test_update_tenant_changes_the_limits_of_its_other_keys(config: Path) -> None:
    new_key(config, "alice", "--requests-per-minute", "10")
    new_key(config, "bob")
    assert "--update-tenant" in run(config, "new", "--tenant", "alice", "--requests-per-minute", "20").output
    new_key(config, "alice", "--requests-per-minute", "20", "--update-tenant")
    keys = load(config).keys_file
    assert keys is not None
    assert [key.requests_per_minute for key in keys.keys] == [20, None, 20]
