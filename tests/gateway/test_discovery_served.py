"""Discovery with real servers: a new one gets requests, and one that is gone drains."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine_adapter.engine import EngineEvents
from engine_adapter.report_channel.messages import EngineLimits
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.discovery import Discovery
from gateway.engines import build_engine
from tests.fixtures.discovery import SECTION, ScriptedResolver, section
from tests.fixtures.live_gateway import CHAT, Live, StubbedEngine, chat, fast_engine, gateway_config, live
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.ports import free_port
from tests.fixtures.report_channel import KEY, LIMITS, report_server
from tests.fixtures.served_process import served


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
