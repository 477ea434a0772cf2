"""The waiting queue is a list sorted by the policy's key, and keeps its requests' numbers as arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.service_kind import ServiceKind
from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from gateway.requests.waiting_arrays import WaitingArrays, tenant_number
from gateway.requests.waiting_queue import WaitingQueue, arrays_of, tenant_weights
from tests.fixtures.policy_builders import make_request


def by_length(request: Request) -> tuple[float, ...]:
    return (request.predicted_tokens,)


def names(queue: Any) -> list[str]:
    return [request.id for request in queue]


def queue_of(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue(by_length)
    for request in requests:
        queue.add(request)
    return queue


def test_smallest_key_comes_first() -> None:
    assert names(queue_of(make_request("b", output=7), make_request("c", output=9), make_request("a", output=2))) == [
        "a",
        "b",
        "c",
    ]


def test_equal_keys_stay_in_arrival_order() -> None:
    queue = queue_of(*(make_request(str(i), output=i % 2) for i in range(6)))
    assert names(queue) == ["0", "2", "4", "1", "3", "5"]
    queue.remove(queue[1])
    queue.add(make_request("late", output=0))
    assert names(queue) == ["0", "4", "late", "1", "3", "5"]


def test_infinite_key_comes_last_and_can_be_removed() -> None:
    queue = WaitingQueue(lambda request: (request.deadline_s, request.arrival_s))
    never, soon, other = make_request("never", at=1), make_request("soon", at=3, ttft=1), make_request("other", at=0)
    for request in (never, soon, other):
        queue.add(request)
    assert names(queue) == ["soon", "other", "never"]
    assert queue.remove(other)
    assert names(queue) == ["soon", "never"]


def test_remove_returns_false_for_an_absent_request() -> None:
    queue = queue_of(make_request("a"))
    assert not queue.remove(make_request("b"))
    assert queue.remove(queue[0])
    assert not queue.remove(make_request("a"))
    assert (len(queue), list(queue), queue.by_class["chat"]) == (0, [], 0)


def test_changed_request_is_found_by_its_old_key() -> None:
    slow, quick = make_request("slow", output=50), make_request("quick", output=5)
    queue = queue_of(slow, quick)
    slow.predict(1, 2)
    assert names(queue) == ["quick", "slow"], "a key is read when its request is added"
    queue.reorder(slow)
    assert names(queue) == ["slow", "quick"]
    quick.predict(0, 0)
    assert queue.remove(quick)
    assert names(queue) == ["slow"]


def test_reorder_without_a_change_keeps_the_position() -> None:
    queue = queue_of(make_request("a"), make_request("b"), make_request("c"))
    queue.reorder(queue[0])
    assert names(queue) == ["a", "b", "c"]


def test_reorder_of_an_absent_request_changes_nothing() -> None:
    queue = queue_of(make_request("a"))
    queue.reorder(make_request("b"))
    assert (names(queue), queue.by_class["chat"]) == (["a"], 1)


def test_queue_counts_requests_by_class() -> None:
    queue = queue_of(
        make_request("a", slo_class="chat"), make_request("b", slo_class="code"), make_request("c", slo_class="chat")
    )
    queue.remove(queue[0])
    assert (queue.by_class["chat"], queue.by_class["code"], queue.by_class["batch"]) == (1, 1, 0)
    queue.clear()
    assert sum(queue.by_class.values()) == 0


def test_membership_is_by_id() -> None:
    queue = queue_of(make_request("a"))
    assert make_request("a", output=99) in queue
    assert make_request("b") not in queue
    assert "a" not in queue


@pytest.mark.parametrize("name", POLICIES)
def test_queue_works_with_the_order_of_every_policy(name: str) -> None:
    queue = WaitingQueue(make_policy(name).order)
    requests = [make_request(str(i), at=i % 3, ttft=None if i % 2 else 1.0, output=i % 4) for i in range(24)]
    for request in requests:
        queue.add(request)
    assert sorted(map(int, names(queue))) == list(range(24))
    assert all(queue.remove(request) for request in requests)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "remove", "reorder", "clear"]), st.integers(0, 30)), max_size=60
)


@given(OPERATIONS)
def test_queue_equals_a_list_sorted_after_every_change(operations: list[tuple[str, int]]) -> None:
    queue = WaitingQueue(by_length)
    model: list[Request] = []  # in order of arrival; sorting is stable
    for number, (what, pick) in enumerate(operations):
        one = model[pick % len(model)] if model else make_request("absent")
        if what == "add":
            queue.add(added := make_request(str(number), output=pick % 5, slo_class="ab"[pick % 2]))
            model.append(added)
        elif what == "remove":
            assert queue.remove(one) == (one in model)
            model = [request for request in model if request is not one]
        elif what == "reorder":
            one.predict(pick % 5 + (number + 1) / 1000, 0)  # a key that no other request has
            queue.reorder(one)
        else:
            queue.clear()
            model.clear()
        expected = sorted(model, key=by_length)
        assert list(queue) == expected
        assert [queue[i] for i in range(len(queue))] == expected
        assert (list(queue[1:3]), list(reversed(queue))) == (expected[1:3], expected[::-1])
        assert (len(queue), bool(queue)) == (len(model), bool(model))
        assert all(request in queue for request in model)
        assert all(queue.by_class[group] == sum(r.slo_class == group for r in model) for group in "ab")


def same(one: WaitingArrays, other: WaitingArrays) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_arrays_hold_the_numbers_of_the_requests() -> None:
    paced = Request("a", "chat", 5.0, Slo(2.0, 0.05, 20.0), 100, 60, sequences=2)
    waived = Request("b", "chat", 6.0, Slo(None, 0.05, 20.0), 30, 40, bounds_waived=True)
    deadline_only = Request("c", "chat", 7.0, Slo(3.0), 20, 50, cached_tokens=16, shared_tokens=8)
    arrays = WaitingArrays.of([paced, waived, deadline_only])
    assert {name: array.tolist() for name, array in arrays._asdict().items()} == {
        "arrival": [5.0, 6.0, 7.0],
        "deadline": [7.0, math.inf, 10.0],
        "end": [25.0, math.inf, math.inf],
        "tpot_bound": [0.05, 0.05, math.inf],
        "kind": [ServiceKind.PACED, ServiceKind.BEST_EFFORT, ServiceKind.DEADLINE_ONLY],
        "sequences": [2, 1, 1],
        "prompt": [100, 30, 20],
        "uncached": [100, 30, 4],
        "shared": [0, 0, 8],
        "output": [60, 40, 50],
        "tenant": [tenant_number("anonymous")] * 3,
    }


@given(OPERATIONS, st.integers(1, 100))
def test_arrays_of_a_queue_equal_those_of_its_requests(operations: list[tuple[str, int]], updates: int) -> None:
    """The arrays are read after every so many ``updates``: after many, the queue builds them again."""
    queue = WaitingQueue(lambda request: (request.deadline_s, request.arrival_s))
    filled = [("add", 3)] * 80  # more than the initial capacity
    for number, (what, pick) in enumerate(filled + operations):
        one = queue[pick % len(queue)] if queue else make_request("absent")
        if what == "add":
            slo = Slo(pick + 1.0 if pick % 3 else None, pick / 100 + 0.01 if pick % 4 else None, 9.0 + pick)
            queue.add(Request(str(number), "chat", float(number), slo, pick + 1, pick * 3.0, pick * 4.0))
        elif what == "remove":
            queue.remove(one)
        elif what == "reorder":
            if pick % 2:
                one.serve_at_best_effort()
            else:
                one.predict(pick + 0.5, 2.0 * pick)
            queue.reorder(one)
        elif pick % 5 == 0:
            queue.clear()
        if number % updates == 0:
            assert same(queue.arrays(), WaitingArrays.of(list(queue)))
            assert same(queue.arrays(pick), WaitingArrays.of(queue[:pick]))
            assert same(arrays_of(queue, pick), arrays_of(list(queue), pick))


def test_arrays_of_a_queue_are_read_only() -> None:
    queue = queue_of(make_request("a"))
    with pytest.raises(ValueError, match="read-only"):
        queue.arrays().arrival[0] = 1.0


def test_queue_knows_the_weights_of_the_tenants_that_wait() -> None:
    queue = WaitingQueue(lambda request: (request.arrival_s,))
    requests = [make_request(name, tenant=name[0], weight=weight) for name, weight in (("a1", 1.0), ("b1", 3.0))]
    for request in requests:
        queue.add(request)
    assert tenant_weights(queue) == tenant_weights(requests) == {"a": 1.0, "b": 3.0}
    assert queue.arrays().tenant.tolist() == [tenant_number("a"), tenant_number("b")]
    queue.remove(requests[0])
    assert tenant_weights(queue) == {"b": 3.0}
