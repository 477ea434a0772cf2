"""Broken files, full disks and too much load: nothing is lost, nothing leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.faults.fault import Fault, measure
from benchmarks.faults.operator_faults import OPERATOR_FAULTS, wait_in_line

pytestmark = pytest.mark.process

FAULTS = [
    replace(fault, name="many waiting", inject=wait_in_line(1500)) if fault.name.endswith("waiting") else fault
    for fault in OPERATOR_FAULTS
]


@pytest.mark.parametrize(("number", "fault"), list(enumerate(FAULTS)), ids=[fault.name for fault in FAULTS])
async def test_fault_loses_and_leaks_nothing(number: int, fault: Fault) -> None:
    result = await measure(fault, fault.kinds[number % len(fault.kinds)], rounds=1)
    assert result.problems == []
    assert result.seen["200"] > 0
