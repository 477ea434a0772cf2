"""Resources that tenants share: none can take all, and one alone gets nearly all."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from gateway.api.auth import ApiKey, KeyRing
from gateway.api.connections import CONNECTION_KEY, Connections
from gateway.api.limits import Limits
from gateway.api.shared_limit import ONLY_SHARER, SharedLimit, Sharer
from gateway.api.sharers import sharer_of
from tests.fixtures.live_server import HANG_S

A, B, C = Sharer("a"), Sharer("b"), Sharer("c")


def filled(shared: SharedLimit, *sharers: Sharer) -> list[int]:
    """Have ``sharers`` take units in turn until none gets more; return what each holds."""
    counts = [0] * len(sharers)
    took = True
    while took:
        took = False
        for index, sharer in enumerate(sharers):
            if shared.try_take(sharer):
                counts[index] += 1
                took = True
    return counts


@pytest.mark.parametrize(("limit", "gets"), [(1, 1), (2, 1), (8, 7), (9, 8), (32, 28), (4096, 3640)])
def test_tenant_alone_gets_nearly_all(limit: int, gets: int) -> None:
    assert filled(SharedLimit(limit), A) == [gets]


def test_only_sharer_gets_all() -> None:
    shared = SharedLimit(7)
    assert filled(shared, ONLY_SHARER) == [7]
    assert not shared.has_room()


def test_other_tenant_gets_in_at_once_and_its_part_when_units_are_freed() -> None:
    shared = SharedLimit(900)
    (held,) = filled(shared, A)
    (later,) = filled(shared, B)
    assert (held, later) == (800, 88)
    assert not shared.try_take(A)
    assert shared.try_take(C), "there is room for one more"
    shared.free(C)
    for _ in range(2000):
        # A's requests end and new ones of both arrive, twenty of A for each of B.
        if held:
            shared.free(A)
            held -= 1
        for sharer in random.Random(held).sample([A] * 20 + [B], 21):
            if shared.try_take(sharer):
                held, later = held + (sharer is A), later + (sharer is B)
    assert abs(held - later) <= 2
    assert held + later >= 840


@pytest.mark.parametrize("weight", [0.25, 1.0, 4.0])
def test_parts_follow_the_weights(weight: float) -> None:
    shared, mine = SharedLimit(1000), Sharer("a", weight)
    held, chance = dict(zip((mine, B), filled(shared, mine, B), strict=True)), random.Random(0)
    for _ in range(10_000):
        ended = chance.choice((mine, B))
        if held[ended]:
            shared.free(ended)
            held[ended] -= 1
        for sharer in chance.choices((mine, B), k=4):
            held[sharer] += shared.try_take(sharer)
    assert held[mine] / held[B] == pytest.approx(weight, rel=0.1)
    assert held[mine] + held[B] > 930


@pytest.mark.parametrize("weight", [0.001, 1000.0])
def test_weight_does_not_matter_to_a_tenant_alone(weight: float) -> None:
    assert filled(SharedLimit(900), Sharer("a", weight)) == [800]


def test_many_units_at_once_leave_a_part_too() -> None:
    shared = SharedLimit(1000)
    assert shared.try_take(A, 800)
    assert not shared.try_take(A, 100)
    assert not shared.try_take(B, 201)
    assert shared.try_take(B, 200), "a tenant that holds nothing may take all that is free"


def test_random_use_never_exceeds_the_limit_and_balances() -> None:
    chance, shared, taken = random.Random(1), SharedLimit(100), []
    sharers = [Sharer(f"tenant {n}", chance.choice((0.1, 1, 7))) for n in range(20)] + [ONLY_SHARER]
    for _ in range(20_000):
        if taken and chance.random() < 0.5:
            shared.free(*taken.pop(chance.randrange(len(taken))))
        else:
            sharer, count = chance.choice(sharers), chance.choice((1, 1, 5, 60))
            if shared.try_take(sharer, count):
                taken.append((sharer, count))
        assert shared.used == sum(count for _, count in taken) <= 100
    for sharer, count in taken:
        shared.free(sharer, count)
    assert (shared.used, shared._parts, shared._weights) == (0, {}, 0.0)


async def test_waiting_requests_of_one_tenant_do_not_block_another() -> None:
    shared = SharedLimit(9)
    filled(shared, A)
    order: list[str] = []

    async def one(sharer: Sharer, name: str) -> None:
        await shared.acquire(sharer)
        order.append(name)

    waiting = [asyncio.create_task(one(A, f"a{n}")) for n in range(3)]
    await asyncio.sleep(0)
    await asyncio.wait_for(one(B, "b"), HANG_S)
    assert order == ["b"]
    assert not shared.try_take(A), "a later request waits behind those that wait"
    for _ in range(4):
        shared.free(A)
        await asyncio.sleep(0.01)
    assert order == ["b", "a0", "a1", "a2"]
    await asyncio.gather(*waiting)


async def test_waiting_request_that_is_cancelled_leaves_its_turn() -> None:
    shared = SharedLimit(1)
    assert shared.try_take(A)
    first, second = (asyncio.create_task(shared.acquire(A)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    shared.free(A)
    await asyncio.wait_for(second, HANG_S)
    assert shared.used == 1
    shared.free(A)
    assert shared.used == 0
    assert not shared._turns, "nothing is kept for tenants that do not wait"


class FakeConnection:
    def __init__(self, address: str, limits: Limits | None = None) -> None:
        self.address = address
        self.is_shared = Connections(limits).is_shared(address)


@pytest.mark.parametrize(
    ("address", "sharer"),
    [
        ("192.0.2.7", Sharer("192.0.2.7")),
        ("2001:db8::/64", Sharer("2001:db8::/64")),
        ("127.0.0.1", ONLY_SHARER),
        ("::/64", ONLY_SHARER),
        ("", ONLY_SHARER),
        ("198.51.100.1", ONLY_SHARER),
    ],
)
def test_clients_without_keys_are_told_apart_by_address(address: str, sharer: Sharer) -> None:
    anonymous = ApiKey("anonymous", "chat")
    connection = FakeConnection(address, Limits(trusted_proxies=("198.51.100.0/24",)))
    scope: dict[str, Any] = {CONNECTION_KEY: connection}
    assert sharer_of(scope, anonymous, KeyRing([], anonymous)) == sharer
    assert sharer_of({}, anonymous, KeyRing([], anonymous)) == ONLY_SHARER


def test_keys_belong_to_their_tenant_and_a_single_tenant_has_no_limit() -> None:
    anonymous = ApiKey("anonymous", "chat")
    keys = [ApiKey("a", "chat", "1" * 64, weight=3), ApiKey("a", "chat", "2" * 64, weight=3)]
    assert sharer_of({}, keys[0], KeyRing(keys, anonymous)) == ONLY_SHARER
    keys.append(ApiKey("b", "chat", "3" * 64))
    assert [sharer_of({}, key, KeyRing(keys, anonymous)) for key in keys] == [Sharer("a", 3)] * 2 + [Sharer("b")]
