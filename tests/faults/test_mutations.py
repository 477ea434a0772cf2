"""Mutated bodies and heads: no 5xx, no traceback, no hang, and a balanced ledger."""

from __future__ import annotations

import random

import pytest

from benchmarks.faults.mutate import VALID, mutation
from benchmarks.faults.mutations import measure
from benchmarks.faults.rig import KINDS, Kind

pytestmark = pytest.mark.process


@pytest.mark.parametrize("kind", KINDS)
async def test_mutated_requests_are_answered_without_a_5xx(kind: Kind) -> None:
    found = await measure(kind, count=300, seed=7)
    assert found["mistakes"] == {}
    assert found["statuses"]["200"] > 20
    assert found["statuses"]["400"] > 100
    assert found["leaked_requests"] == found["leaked_descriptors"] == found["tracebacks"] == 0


def test_mutation_is_reproducible_and_reaches_every_route() -> None:
    one, other = random.Random(3), random.Random(3)
    first = [mutation(one) for _ in range(200)]
    assert first == [mutation(other) for _ in range(200)]
    assert {each.path for each in first} == set(VALID)
    assert len({each.data for each in first}) > 190
