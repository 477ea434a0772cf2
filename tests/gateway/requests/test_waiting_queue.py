"""The waiting queue is a sorted list that knows where everybody stands."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from gateway.requests.waiting_arrays import WaitingArrays
from gateway.requests.waiting_queue import WaitingQueue, arrays_of


def ask(name: str, *, at: float = 0.0, ttft: float | None = None, output: float = 10, group: str = "chat") -> Request:
    return Request(name, group, at, Slo(ttft), 100, output)


def by_length(request: Request) -> tuple[float, ...]:
    return (request.predicted_tokens,)


def names(queue: Any) -> list[str]:
    return [request.id for request in queue]


def queue_of(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue(by_length)
    for request in requests:
        queue.add(request)
    return queue


def test_the_least_key_comes_first() -> None:
    assert names(queue_of(ask("b", output=7), ask("c", output=9), ask("a", output=2))) == ["a", "b", "c"]


def test_equal_keys_keep_their_order_of_arrival() -> None:
    queue = queue_of(*(ask(str(i), output=i % 2) for i in range(6)))
    assert names(queue) == ["0", "2", "4", "1", "3", "5"]
    queue.remove(queue[1])
    queue.add(ask("late", output=0))
    assert names(queue) == ["0", "4", "late", "1", "3", "5"]


def test_an_infinite_key_comes_last_and_can_leave() -> None:
    queue = WaitingQueue(lambda request: (request.deadline_s, request.arrival_s))
    never, soon, other = ask("never", at=1), ask("soon", at=3, ttft=1), ask("other", at=0)
    for request in (never, soon, other):
        queue.add(request)
    assert names(queue) == ["soon", "other", "never"]
    assert queue.remove(other)
    assert names(queue) == ["soon", "never"]


def test_who_does_not_wait_cannot_leave() -> None:
    queue = queue_of(ask("a"))
    assert not queue.remove(ask("b"))
    assert queue.remove(queue[0])
    assert not queue.remove(ask("a"))
    assert (len(queue), list(queue), queue.by_class["chat"]) == (0, [], 0)


def test_a_request_is_found_by_its_old_key_although_it_has_changed() -> None:
    slow, quick = ask("slow", output=50), ask("quick", output=5)
    queue = queue_of(slow, quick)
    slow.predict(1, 2)
    assert names(queue) == ["quick", "slow"], "a key is read when its request is added"
    queue.reorder(slow)
    assert names(queue) == ["slow", "quick"]
    quick.predict(0, 0)
    assert queue.remove(quick)
    assert names(queue) == ["slow"]


def test_a_request_that_is_reordered_without_a_change_stays_where_it_was() -> None:
    queue = queue_of(ask("a"), ask("b"), ask("c"))
    queue.reorder(queue[0])
    assert names(queue) == ["a", "b", "c"]


def test_reordering_who_does_not_wait_changes_nothing() -> None:
    queue = queue_of(ask("a"))
    queue.reorder(ask("b"))
    assert (names(queue), queue.by_class["chat"]) == (["a"], 1)


def test_it_is_counted_by_class_how_many_wait() -> None:
    queue = queue_of(ask("a", group="chat"), ask("b", group="code"), ask("c", group="chat"))
    queue.remove(queue[0])
    assert (queue.by_class["chat"], queue.by_class["code"], queue.by_class["batch"]) == (1, 1, 0)
    queue.clear()
    assert sum(queue.by_class.values()) == 0


def test_membership_is_by_id() -> None:
    queue = queue_of(ask("a"))
    assert ask("a", output=99) in queue
    assert ask("b") not in queue
    assert "a" not in queue


@pytest.mark.parametrize("name", POLICIES)
def test_every_policys_order_stands_for_any_request(name: str) -> None:
    queue = WaitingQueue(make_policy(name).order)
    requests = [ask(str(i), at=i % 3, ttft=None if i % 2 else 1.0, output=i % 4) for i in range(24)]
    for request in requests:
        queue.add(request)
    assert sorted(map(int, names(queue))) == list(range(24))
    assert all(queue.remove(request) for request in requests)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "remove", "reorder", "clear"]), st.integers(0, 30)), max_size=60
)


@given(OPERATIONS)
def test_it_behaves_as_a_list_that_is_sorted_after_every_change(operations: list[tuple[str, int]]) -> None:
    queue = WaitingQueue(by_length)
    model: list[Request] = []  # in order of arrival; sorting is stable
    for number, (what, pick) in enumerate(operations):
        one = model[pick % len(model)] if model else ask("nobody")
        if what == "add":
            queue.add(model_request := ask(str(number), output=pick % 5, group="ab"[pick % 2]))
            model.append(model_request)
        elif what == "remove":
            assert queue.remove(one) == (one in model)
            model = [request for request in model if request is not one]
        elif what == "reorder":
            one.predict(pick % 5 + (number + 1) / 1000, 0)  # a key that nobody else has
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


def test_columns_say_what_the_requests_say() -> None:
    asked = Request("a", "chat", 5.0, Slo(2.0, 0.05, 20.0), 100, 60, 60 + 1.2815515655446004 * 10, sequences=2)
    asked.tpot_slo_s = 0.03
    calm = Request("b", "chat", 6.0, Slo(None, 0.05, 20.0), 30, 40, best_effort=True)
    found = WaitingArrays.of([asked, calm])
    assert [column.tolist() for column in found[:-1]] == [
        [5.0, 6.0],
        [7.0, math.inf],
        [25.0, math.inf],
        [0.03, math.inf],
        [0.05, 0.05],
        [2, 1],
        [100, 30],
        [60, 40],
        [60, 40],
        [130, 50],
    ]
    assert found.variance.tolist() == pytest.approx([200.0, 0.0])


@given(OPERATIONS, st.integers(0, 9))
def test_the_columns_of_a_queue_are_those_of_its_requests(operations: list[tuple[str, int]], asked_after: int) -> None:
    queue = WaitingQueue(lambda request: (request.deadline_s, request.arrival_s))
    for number, (what, pick) in enumerate([("add", 3)] * 60 + operations):  # 60, so that they outgrow their first room
        one = queue[pick % len(queue)] if queue else ask("nobody")
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
        if number >= asked_after:
            assert same(queue.arrays(), WaitingArrays.of(list(queue)))
            assert same(queue.arrays(pick), WaitingArrays.of(queue[:pick]))
            assert same(arrays_of(queue, pick), arrays_of(list(queue), pick))


def test_nobody_writes_to_the_columns_of_a_queue() -> None:
    queue = queue_of(ask("a"))
    with pytest.raises(ValueError, match="read-only"):
        queue.arrays().arrival[0] = 1.0
