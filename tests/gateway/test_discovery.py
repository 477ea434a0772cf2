"""Discovery: engines follow the addresses of a host, or the URLs in a file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway import discovery
from gateway.discovery import Discovery, resolve
from tests.fixtures.discovery import SECTION, ScriptedResolver, found, section
from tests.fixtures.live_gateway import gateway_config
from tests.fixtures.live_server import eventually


@pytest.mark.parametrize(
    ("base_url", "address", "expected"),
    [
        ("http://pods.test:8000", "10.0.0.7", "http://10.0.0.7:8000"),
        ("http://pods.test", "10.0.0.7", "http://10.0.0.7"),
        ("http://pods.test:8000/llm/v1", "10.0.0.7", "http://10.0.0.7:8000/llm/v1"),
        ("http://pods.test:8000", "fd00::7", "http://[fd00::7]:8000"),
        ("http://pods.test", "fd00::7", "http://[fd00::7]"),
    ],
)
async def test_each_address_is_an_engine(base_url: str, address: str, expected: str) -> None:
    resolver = ScriptedResolver(address, "10.0.0.9")
    assert expected in (await found(resolver, section(base_url=base_url))).values()
    assert resolver.asked[0] == ("pods.test", 8000 if ":8000" in base_url else 80)


async def test_section_without_discover_is_one_engine() -> None:
    plain, resolver = section(discover=None), ScriptedResolver("10.0.0.7")
    assert await found(resolver, plain) == {"pool": "http://pods.test:8000"}
    assert resolver.asked == []


@pytest.mark.parametrize("addresses", [(), ("not an address",), ("fe80::1%eth0",)])
async def test_host_without_usable_addresses_is_one_engine_with_its_name(addresses: tuple[str, ...]) -> None:
    assert await found(ScriptedResolver(*addresses), section()) == {"pool-0": "http://pods.test:8000"}


async def test_known_address_keeps_its_name() -> None:
    resolver = ScriptedResolver("10.0.0.5", "10.0.0.7")
    knows = Discovery(resolver)
    before = await found(resolver, section(), knows)
    resolver.addresses = ("10.0.0.7", "10.0.0.3", "10.0.0.5")
    after = await found(resolver, section(), knows)
    assert before == {"pool-0": "http://10.0.0.5:8000", "pool-1": "http://10.0.0.7:8000"}
    assert after == {**before, "pool-2": "http://10.0.0.3:8000"}


async def test_names_stay_few_when_servers_are_replaced_often() -> None:
    resolver = ScriptedResolver()
    knows = Discovery(resolver)
    names: set[str] = set()
    for replaced in range(100):
        resolver.addresses = (f"10.0.1.{replaced}", f"10.0.1.{replaced + 1}")
        engines = await found(resolver, section(), knows)
        assert len(engines) == 2
        names |= set(engines)
    assert names == {"pool-0", "pool-1", "pool-2"}


async def test_name_of_an_address_that_has_just_gone_is_not_used_at_once() -> None:
    resolver = ScriptedResolver("10.0.0.5")
    knows = Discovery(resolver)
    await found(resolver, section(), knows)
    resolver.addresses = ("10.0.0.6",)
    assert list(await found(resolver, section(), knows)) == ["pool-1"]


@pytest.mark.parametrize("error", [OSError("no such host"), UnicodeError("label too long"), TimeoutError()])
async def test_failed_look_up_changes_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    resolver = ScriptedResolver("10.0.0.5", "10.0.0.7")
    knows = Discovery(resolver)
    before = await found(resolver, section(), knows)
    resolver.error = error
    for _ in range(3):
        assert await found(resolver, section(), knows) == before
    assert len([r for r in caplog.records if "cannot look up" in r.message]) == 1
    resolver.error, resolver.addresses = None, ()
    assert await found(resolver, section(), knows) == before


async def test_silent_name_server_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "LOOK_UP_TIMEOUT_S", 0.05)

    async def silent(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    knows = Discovery(silent)
    async with asyncio.timeout(30):
        await knows.refresh([section()])
    assert [engine.name for engine in knows.expand(section())] == ["pool-0"]


async def test_addresses_beyond_the_limit_are_ignored() -> None:
    resolver = ScriptedResolver("10.0.0.5", "10.0.0.7")
    knows, pool = Discovery(resolver), section(discover={"max_engines": 2})
    before = await found(resolver, pool, knows)
    resolver.addresses = ("10.0.0.1", "10.0.0.5", "10.0.0.7")
    assert await found(resolver, pool, knows) == before


async def test_section_with_another_host_forgets_the_addresses() -> None:
    resolver = ScriptedResolver("10.0.0.5")
    knows = Discovery(resolver)
    await found(resolver, section(), knows)
    moved = section(base_url="http://others.test:8000")
    assert [engine.name for engine in knows.expand(moved)] == ["pool-0"]
    resolver.addresses = ("10.0.0.8",)
    assert await found(resolver, moved, knows) == {"pool-0": "http://10.0.0.8:8000"}


async def test_follow_applies_after_each_look_up_and_survives_errors(caplog: pytest.LogCaptureFixture) -> None:
    resolver, applied = ScriptedResolver("10.0.0.5"), []

    def apply() -> None:
        applied.append(len(resolver.asked))
        raise RuntimeError("cannot be applied")

    pools = [section(discover={"every_s": 0.5})]
    task = asyncio.create_task(Discovery(resolver).follow(lambda: pools, apply))
    await eventually(lambda: len(applied) == 2)
    task.cancel()
    assert applied == [1, 2]
    errors = [record for record in caplog.records if "stay as they are" in record.getMessage()]
    assert [record.exc_info for record in errors] == [False], "the same error is logged once, without frames"


async def test_resolver_returns_one_family_of_addresses() -> None:
    assert set(await resolve("localhost", 8000)) == {"127.0.0.1"}
    assert await resolve("::1", 8000) == ["::1"]
    with pytest.raises(OSError):
        await resolve("no-such-host.invalid", 8000)


def test_configuration_rejects_tls_with_addresses() -> None:
    with pytest.raises(ValidationError, match="certificates name hosts"):
        section(base_url="https://pods.test")


def test_configuration_rejects_names_that_discovered_engines_may_get() -> None:
    other = {"kind": "simulated", "name": "pool-12"}
    with pytest.raises(ValidationError, match="rename one"):
        gateway_config(engines=[SECTION, other])
    assert gateway_config(engines=[SECTION, {**other, "name": "pool-a"}]).engines[0].name == "pool"


def test_descriptors_are_reserved_for_all_engines_that_may_be_found() -> None:
    one = gateway_config(engines=[{**SECTION, "discover": None, "max_connections": 10}])
    many = gateway_config(engines=[{**SECTION, "discover": {"max_engines": 7}, "max_connections": 10}])
    assert many.engine_connections() == 7 * one.engine_connections()


# --- a file -----------------------------------------------------------------------------------------------------------


async def test_each_url_in_a_file_is_an_engine(tmp_path: Path) -> None:
    file, resolver = tmp_path / "engines.json", ScriptedResolver()
    pool, knows = section(discover={"file": str(file)}), Discovery(resolver)
    assert await found(resolver, pool, knows) == {"pool-0": "http://pods.test:8000"}
    file.write_text(json.dumps({"engines": ["http://10.0.0.5:8000/", "https://gpu.test"]}))
    assert await found(resolver, pool, knows) == {"pool-0": "http://10.0.0.5:8000", "pool-1": "https://gpu.test"}
    file.write_text(json.dumps({"engines": ["https://gpu.test"]}))
    assert await found(resolver, pool, knows) == {"pool-1": "https://gpu.test"}
    assert resolver.asked == []


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"engines": null}', '{"engines": [7]}', '{"engines": ["10.0.0.5:8000"]}',
        '{"engines": ["http://"]}', '{"engines": ["http://10.0.0.6:80a0"]}', '{"engines": ["http://10.0.0.6:80000"]}',
        '{"engines": ["file:///etc/passwd"]}', '{"engines": ["http://user:key@a"]}',
        '{"engines": [{"report_port": 9}]}', '{"engines": [{"url": "http://a", "report_port": 65536}]}',
        '{"engines": [{"url": "http://a", "report_port": "9"}]}',
        '{"engines": ["http://[::1"]}', "\xff", "[" * 100_000, '{"engines": []}', " " * (discovery.MAX_FILE_BYTES + 1),
    ],
)  # fmt: skip
async def test_bad_file_changes_nothing(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    file, resolver = tmp_path / "engines.json", ScriptedResolver()
    pool, knows = section(discover={"file": str(file)}), Discovery(resolver)
    file.write_text(json.dumps({"engines": ["http://10.0.0.5:8000"]}))
    before = await found(resolver, pool, knows)
    file.write_text(content)
    assert await found(resolver, pool, knows) == before
    assert "cannot look up servers" in caplog.text
    file.unlink()
    assert await found(resolver, pool, knows) == before


async def test_file_says_the_report_port_of_each_server(tmp_path: Path) -> None:
    file, report = tmp_path / "engines.json", {"key_env": "KEY"}
    pool, knows = section(discover={"file": str(file)}, report=report), Discovery(ScriptedResolver())
    servers = ["http://a:1", {"url": "http://a:2", "report_port": 9502}]

    async def ports(pool: Any) -> list[int | None]:
        await knows.refresh([pool])
        return [engine.report.port for engine in knows.expand(pool)]

    assert await ports(pool) == [None]
    file.write_text(json.dumps({"engines": servers}))
    assert await ports(pool) == [None, 9502]
    assert await ports(section(discover={"file": str(file)}, report={**report, "port": 9410})) == [9410, 9502]
    file.write_text(json.dumps({"engines": [servers[0], {**servers[1], "report_port": 9503}]}))
    assert await ports(pool) == [None, 9503]
    silent = section(discover={"file": str(file)})
    assert [engine.report for engine in knows.expand(silent)] == [None, None]


def test_report_port_may_be_missing_only_where_a_file_says_it() -> None:
    with pytest.raises(ValueError, match=r"report.port is missing"):
        section(report={"key_env": "KEY"})
    with pytest.raises(ValueError, match=r"report.port is missing"):
        section(discover=None, report={"key_env": "KEY"})


def test_configuration_accepts_tls_with_a_file() -> None:
    assert section(base_url="https://pods.test", discover={"file": "engines.json"}).most_engines == 64
