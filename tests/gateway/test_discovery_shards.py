"""Discovery by several gateways: each has a share of the engines."""

from __future__ import annotations

import pytest

from gateway.config.engines import HttpEngineConfig, SimulatedEngineConfig
from gateway.discovery import Discovery
from gateway.scheduling.shards import Shard
from tests.fixtures.discovery import ScriptedResolver, section


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
