"""Servers and predictors that die, hang, start slowly and answer garbage: nothing is lost, nothing leaks."""

from __future__ import annotations

import pytest

from benchmarks.faults.fault import Fault, measure
from benchmarks.faults.process_faults import PROCESS_FAULTS

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("number", "fault"), list(enumerate(PROCESS_FAULTS)), ids=[fault.name for fault in PROCESS_FAULTS]
)
async def test_fault_loses_and_leaks_nothing(number: int, fault: Fault) -> None:
    result = await measure(fault, fault.kinds[number % len(fault.kinds)], rounds=1)
    assert result.problems == []
    assert result.seen["200"] > 0
