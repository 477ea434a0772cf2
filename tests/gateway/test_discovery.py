"""Discovery: engines follow the addresses of a host."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine_adapter.engine import EngineEvents
from engine_adapter.report_channel.messages import EngineLimits
from engine_adapter.step_time.linear_forms import StepTimes
from gateway import discovery
from gateway.config.engines import HttpEngineConfig, SimulatedEngineConfig
from gateway.discovery import Discovery, resolve
from gateway.engines import build_engine
from gateway.scheduling.shards import Shard
from tests.fixtures.live_gateway import CHAT, Live, StubbedEngine, chat, fast_engine, gateway_config, live
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.ports import free_port
from tests.fixtures.report_channel import KEY, LIMITS, report_server
from tests.fixtures.served_process import served

SECTION: dict[str, Any] = {"kind": "http", "name": "pool", "base_url": "http://pods.test:8000", "discover": {}}


def section(**changes: Any) -> HttpEngineConfig:
    return HttpEngineConfig(**{**SECTION, **changes})


class ScriptedResolver:
    """Answers each look-up with ``addresses``, or raises ``error``."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: tuple[str, ...] = addresses
        self.error: Exception | None = None
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> tuple[str, ...]:
        self.asked.append((host, port))
        if self.error is not None:
            raise self.error
        return self.addresses


async def found(resolver: ScriptedResolver, pool: HttpEngineConfig, knows: Discovery | None = None) -> dict[str, str]:
    """Return the address of each engine of ``pool`` by name, after another look-up."""
    knows = knows or Discovery(resolver)
    await knows.refresh([pool])
    return {engine.name: getattr(engine, "base_url", "") for engine in knows.expand(pool)}


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


async def test_follow_applies_after_each_look_up_and_survives_errors() -> None:
    resolver, applied = ScriptedResolver("10.0.0.5"), []

    def apply() -> None:
        applied.append(len(resolver.asked))
        raise RuntimeError("cannot be applied")

    pools = [section(discover={"every_s": 0.5})]
    task = asyncio.create_task(Discovery(resolver).follow(lambda: pools, apply))
    await eventually(lambda: len(applied) == 2)
    task.cancel()
    assert applied == [1, 2]


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
        '{"engines": ["http://"]}', '{"engines": ["file:///etc/passwd"]}', '{"engines": ["http://user:key@a"]}',
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


# --- with servers -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def servers(*hosts: str) -> AsyncIterator[tuple[int, dict[str, StubbedEngine]]]:
    """Serve a simulated engine on each of ``hosts``, on one port. Yields it, and the engines by host."""
    port, engines = free_port(hosts), {host: fast_engine(times=StepTimes(d=0.02)) for host in hosts}
    async with _all_served(list(engines.items()), port):
        yield port, engines
    for engine in engines.values():
        await engine.stop()


@asynccontextmanager
async def _all_served(engines: list[tuple[str, StubbedEngine]], port: int) -> AsyncIterator[None]:
    if not engines:
        yield
        return
    (host, engine), *others = engines
    await engine.start(EngineEvents())
    async with serve(engine.app, port, host=host), _all_served(others, port):
        yield


@asynccontextmanager
async def following(resolver: ScriptedResolver, port: int) -> AsyncIterator[Live]:
    """Serve a gateway whose engines follow ``resolver``."""
    pools = [{**SECTION, "base_url": f"http://pods.test:{port}", "discover": {"every_s": 0.5}}]
    config, knows = gateway_config(engines=pools), Discovery(resolver)
    await knows.refresh(config.engines)
    first, *more = [build_engine(engine) for engine in knows.expand(config.engines[0])]
    async with live(first, more_engines=more, engines=pools, expand=knows.engines) as antares:
        gateway = antares.gateway
        task = asyncio.create_task(knows.follow(lambda: gateway.config.engines, gateway.update_engines))
        try:
            yield antares
        finally:
            task.cancel()


def names(antares: Live) -> list[str]:
    return [queue.engine.name for queue in antares.gateway.engine_queues]


def all_alive(antares: Live) -> bool:
    return all(queue.engine.state.alive for queue in antares.gateway.engine_queues)


@pytest.mark.process
async def test_servers_of_one_host_report_on_ports_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPORT_KEY", KEY.decode())
    file = tmp_path / "engines.json"
    pool, knows = section(discover={"file": str(file)}, report={"key_env": "REPORT_KEY"}), Discovery()
    async with servers("127.0.0.1", "127.0.0.2") as (port, _):
        with report_server(limits=EngineLimits(4, 512, 1024)) as one, report_server(limits=LIMITS) as other:
            ports = {"127.0.0.1": one.port, "127.0.0.2": other.port}
            entries = [{"url": f"http://{host}:{port}", "report_port": ports[host]} for host in ports]
            file.write_text(json.dumps({"engines": entries}))
            pool = pool.model_copy(update={"report": pool.report.model_copy(update={"host": "127.0.0.1"})})
            await knows.refresh([pool])
            engines = [build_engine(engine) for engine in knows.expand(pool)]
            for engine in engines:
                await engine.start(EngineEvents())
            await eventually(lambda: all(engine.state.reports.source == "channel" for engine in engines))
            assert [engine.state.max_num_seqs for engine in engines] == [4, 8]
            for engine in engines:
                await engine.stop()


async def test_new_address_gets_requests_and_a_vanished_one_drains() -> None:
    resolver = ScriptedResolver("127.0.0.1")
    async with servers("127.0.0.1", "127.0.0.2") as (port, engines), following(resolver, port) as antares:
        one, two = engines["127.0.0.1"].state, engines["127.0.0.2"].state
        body = chat(stream=True, max_tokens=150, ignore_eos=True)
        first = [asyncio.create_task(antares.ask(body, x_slo_class="free")) for _ in range(4)]
        await eventually(lambda: one.engine_running == 4)

        resolver.addresses = ("127.0.0.1", "127.0.0.2")
        await eventually(lambda: names(antares) == ["pool-0", "pool-1"])
        second = [asyncio.create_task(antares.ask(body, x_slo_class="free")) for _ in range(4)]
        await eventually(lambda: two.engine_running > 0)

        resolver.addresses = ("127.0.0.2",)
        await eventually(lambda: names(antares) == ["pool-1"])
        assert antares.gateway.engines.leaving == ["pool-0"]
        assert one.engine_running >= 4
        before = two.engine_running
        third = [asyncio.create_task(antares.ask(body, x_slo_class="free")) for _ in range(4)]
        await eventually(lambda: two.engine_running == before + 4)

        answers = await asyncio.gather(*first, *second, *third)
        assert [answer.status_code for answer in answers] == [200] * 12
        assert all(answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text for answer in answers)
        await eventually(lambda: antares.gateway.engines.leaving == [])
        assert antares.outcomes["finished"] == 12
        assert antares.gateway.ledger.open_count == 0


@pytest.mark.process
async def test_vanished_address_leaves_although_a_new_one_never_answers() -> None:
    resolver = ScriptedResolver("127.0.0.1", "127.0.0.2")
    async with servers("127.0.0.1", "127.0.0.2") as (port, _), following(resolver, port) as antares:
        await eventually(lambda: all_alive(antares))
        resolver.addresses = ("127.0.0.2", "127.0.0.3")
        await eventually(lambda: names(antares) == ["pool-1"])
        assert (await antares.ask()).status_code == 200
        assert antares.gateway.engines.starting == ["pool-2"]


@pytest.mark.process
async def test_last_address_serves_until_its_successor_is_up() -> None:
    resolver = ScriptedResolver("127.0.0.1")
    async with servers("127.0.0.1", "127.0.0.2") as (port, _), following(resolver, port) as antares:
        resolver.addresses = ("127.0.0.3",)
        await eventually(lambda: antares.gateway.engines.starting == ["pool-1"])
        assert (await antares.ask()).status_code == 200
        resolver.addresses = ("127.0.0.2", "127.0.0.3")
        await eventually(lambda: names(antares) == ["pool-0"] or names(antares) == ["pool-2"])
        assert (await antares.ask()).status_code == 200


@pytest.mark.process
async def test_request_waits_for_the_first_address() -> None:
    resolver = ScriptedResolver()
    async with servers("127.0.0.1") as (port, _), following(resolver, port) as antares:
        assert names(antares) == ["pool-0"]
        waiting = asyncio.create_task(antares.ask(x_slo_class="free"))
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        resolver.addresses = ("127.0.0.1",)
        assert (await waiting).status_code == 200
        assert names(antares) == ["pool-0"]
        assert all_alive(antares)


@pytest.mark.process
async def test_reload_keeps_discovered_engines() -> None:
    resolver = ScriptedResolver("127.0.0.1", "127.0.0.2")
    async with servers("127.0.0.1", "127.0.0.2") as (port, _), following(resolver, port) as antares:
        kept = [queue.engine for queue in antares.gateway.engine_queues]
        pools = [engine.model_dump() for engine in antares.gateway.config.engines]
        done = antares.gateway.reload(gateway_config(engines=[*pools, {"kind": "simulated", "name": "more"}]))
        assert (done.changed, done.leaving) == (["engines"], [])
        await eventually(lambda: names(antares) == ["pool-0", "pool-1", "more"])
        assert [queue.engine for queue in antares.gateway.engine_queues][:2] == kept


@pytest.mark.process
async def test_served_gateway_finds_the_addresses_of_a_real_name(tmp_path: Path) -> None:
    async with servers("127.0.0.1") as (port, _):
        config = f"""\
server: {{port: 0, drain_s: 5}}
engines: [{{kind: http, name: pool, base_url: "http://localhost:{port}", discover: {{}}}}]
predictor: {{enabled: false}}
classes: {{chat: {{}}}}
default_class: chat
"""
        async with served(tmp_path, config) as (_, http):
            assert (await http.post(CHAT, json=chat())).status_code == 200
            assert 'antares_engine_up{engine="pool-0"} 1.0' in (await http.get("/metrics")).text


# --- several gateways -------------------------------------------------------------------------------------------------


def urls(knows: Discovery, sections: list[HttpEngineConfig]) -> set[str]:
    return {getattr(engine, "base_url", "") for engines in knows.engines(sections) for engine in engines}


async def test_gateways_divide_the_addresses_of_a_host() -> None:
    addresses = tuple(f"10.0.0.{number}" for number in range(1, 11))
    shares = []
    for index in range(3):
        # Each gateway may have got to know the servers in another order.
        resolver = ScriptedResolver(*addresses[index : index + 2])
        knows = Discovery(resolver, Shard(index, 3))
        await knows.refresh([section()])
        resolver.addresses = addresses
        await knows.refresh([section()])
        shares.append(urls(knows, [section()]))
    assert sorted(url for share in shares for url in share) == sorted(f"http://{one}:8000" for one in addresses)
    assert sorted(map(len, shares)) == [3, 3, 4]


async def test_limit_on_addresses_is_that_of_one_gateway() -> None:
    resolver, pool = ScriptedResolver(*(f"10.0.0.{n}" for n in range(8))), section(discover={"max_engines": 4})
    shares = []
    for index in range(2):
        knows = Discovery(resolver, Shard(index, 2))
        await knows.refresh([pool])
        shares.append(urls(knows, [pool]))
    assert len(set().union(*shares)) == 8


async def test_gateways_divide_each_pool_of_fixed_addresses() -> None:
    sections = [
        section(name=f"{pool}-{number}", base_url=f"http://{pool}{number}:8000", discover=None)
        for pool in ("small", "large")
        for number in range(1, 5)
    ]
    shares = [urls(Discovery(ScriptedResolver(), Shard(index, 2)), sections) for index in range(2)]
    assert [sum("small" in url for url in share) for share in shares] == [2, 2]
    assert [len(share) for share in shares] == [4, 4]
    assert not shares[0] & shares[1]


async def test_every_gateway_has_an_engine_of_a_pool_that_is_too_small() -> None:
    one = section(name="large", discover=None)
    found = [Discovery(ScriptedResolver(), Shard(index, 3)).engines([one]) for index in range(3)]
    assert found == [[[one]]] * 3


def test_engines_in_the_process_are_not_divided() -> None:
    own = SimulatedEngineConfig(kind="simulated")
    assert [Discovery(shard=Shard(index, 2)).engines([own]) for index in range(2)] == [[[own]]] * 2


async def test_engine_that_moves_to_another_gateway_leaves_and_joins(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "antares.discovery")
    addresses = tuple(f"10.0.0.{number}" for number in range(1, 9))
    resolver = ScriptedResolver(*addresses)
    gateways = [Discovery(resolver, Shard(index, 2)) for index in range(2)]
    for resolver.addresses in (addresses, addresses[:-1], (*addresses, "10.0.0.9")):
        for knows in gateways:
            await knows.refresh([section()])
        shares = [urls(knows, [section()]) for knows in gateways]
        assert not shares[0] & shares[1]
        assert len(shares[0] | shares[1]) == len(resolver.addresses)
    assert "engine pool: 4 of 8 servers are this gateway's" in caplog.text
