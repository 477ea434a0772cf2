"""Clients that disconnect, stall and send what is malformed: nothing is lost, nothing leaks."""

from __future__ import annotations

import pytest

from benchmarks.faults.client_faults import CLIENT_FAULTS
from benchmarks.faults.fault import Fault, measure

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("number", "fault"), list(enumerate(CLIENT_FAULTS)), ids=[fault.name for fault in CLIENT_FAULTS]
)
async def test_fault_loses_and_leaks_nothing(number: int, fault: Fault) -> None:
    result = await measure(fault, fault.kinds[number % len(fault.kinds)], rounds=1)
    assert result.problems == []
    assert result.seen["200"] > 0
