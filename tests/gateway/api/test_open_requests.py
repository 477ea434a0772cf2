"""Open requests: a flood of one SLO class of a tenant leaves room for the tenant's other classes."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway.api.auth import hash_key
from gateway.api.open_requests import OpenRequests
from gateway.api.shared_limit import ONLY_SHARER, Sharer
from tests.fixtures.live_gateway import AdmitNothing, live
from tests.fixtures.live_server import HANG_S, eventually

A, B = Sharer("a"), Sharer("b")


def flood(requests: OpenRequests, sharer: Sharer, slo_class: str) -> int:
    """Enter until the class gets no more; return how many entered."""
    count = 0
    while requests.enter(sharer, slo_class):
        count += 1
    return count


@pytest.mark.parametrize("sharer", [A, ONLY_SHARER])
def test_flood_of_one_class_leaves_room_for_the_others(sharer: Sharer) -> None:
    requests = OpenRequests(4096)
    flooded = flood(requests, sharer, "batch")
    assert flooded > 0.75 * 4096
    for _ in range(40):
        assert requests.enter(sharer, "interactive")
    assert requests.enter(sharer, "third")


@pytest.mark.parametrize(("sharer", "gets"), [(A, 3640), (ONLY_SHARER, 4096)])
def test_only_class_gets_the_part_of_its_tenant(sharer: Sharer, gets: int) -> None:
    assert flood(OpenRequests(4096), sharer, "") == gets


def test_classes_get_equal_parts_as_requests_end() -> None:
    requests, chance = OpenRequests(900), random.Random(0)
    held = {"batch": flood(requests, A, "batch"), "interactive": 0}
    for _ in range(5000):
        if held["batch"]:
            requests.leave(A, "batch")
            held["batch"] -= 1
        for slo_class in chance.sample(["batch"] * 20 + ["interactive"], 21):
            held[slo_class] += requests.enter(A, slo_class)
    assert abs(held["batch"] - held["interactive"]) <= 2


def test_flood_of_one_class_takes_no_more_from_another_tenant() -> None:
    requests = OpenRequests(900)
    flood(requests, A, "batch")
    assert flood(requests, B, "batch") > 80


def test_class_that_holds_none_enters_while_the_tenant_may() -> None:
    requests = OpenRequests(2)
    assert requests.enter(A, "batch")
    assert not requests.enter(A, "batch")
    assert requests.enter(B, "batch")
    assert not requests.enter(A, "interactive"), "nothing is free"


def test_requests_that_ended_leave_nothing_behind() -> None:
    requests, chance = OpenRequests(50), random.Random(1)
    open_requests: list[tuple[Sharer, str]] = []
    for _ in range(2000):
        one = (chance.choice((A, B, ONLY_SHARER)), chance.choice(("batch", "interactive", "")))
        if requests.enter(*one):
            open_requests.append(one)
        if chance.random() < 0.5 and open_requests:
            requests.leave(*open_requests.pop(chance.randrange(len(open_requests))))
        assert requests.used == len(open_requests) <= 50
    for one in open_requests:
        requests.leave(*one)
    assert (requests.used, requests._of_class, requests._parts) == (0, {}, {})


async def test_batch_flood_of_a_tenant_leaves_its_interactive_class_room() -> None:
    keys = [{"tenant": name, "sha256": hash_key(f"sk-{name}")} for name in ("both", "other")]
    headers = {"authorization": "Bearer sk-both"}
    async with live(keys=keys, server={"max_open_requests": 90}) as antares:
        queue = antares.gateway.engine_queues[0]
        policy, queue.admission.policy = queue.admission.policy, AdmitNothing()
        tasks = [asyncio.create_task(antares.ask(**headers, x_slo_class="batch")) for _ in range(90)]
        await eventually(lambda: sum(task.done() for task in tasks) + antares.gateway.ledger.open_count == 90)
        rejected = [task.result() for task in tasks if task.done()]
        assert 5 < len(rejected) < 30
        assert {answer.status_code for answer in rejected} == {429}
        assert "This SLO class of the tenant has too many open requests" in rejected[0].text
        own = asyncio.create_task(antares.ask(**headers, x_slo_class="chat"))
        await eventually(lambda: antares.gateway.ledger.open_count == 91 - len(rejected))
        queue.admission.policy = policy
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await asyncio.wait_for(own, HANG_S)).status_code == 200
        await eventually(lambda: antares.gateway.proxy.open_requests.used == 0)
