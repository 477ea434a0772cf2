"""Finished lengths reach the predictor some time, and never at a request's cost."""

from __future__ import annotations

import asyncio

import pytest

from gateway.prediction import reports as length_reports
from gateway.prediction.reports import MOST_AT_ONCE, MOST_WAITING, LengthReport, LengthReports, UnreachableError
from tests.fixtures.live_gateway import eventually


def report(n: int) -> LengthReport:
    return LengthReport(f"r{n}", "m", "chat", 10.0, 20.0, n, False)


class Service:
    """Takes reports while it is ``up``."""

    def __init__(self, up: bool = True) -> None:
        self.up, self.got, self.calls = up, list[int](), 0

    async def __call__(self, reports: list[LengthReport]) -> None:
        self.calls += 1
        if not self.up:
            raise UnreachableError
        self.got += [one.tokens for one in reports]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_reports, "GATHER_S", 0.01)
    monkeypatch.setattr(length_reports, "RETRY_S", 0.01)


async def test_reports_gather_and_go_out_in_order_and_in_batches() -> None:
    service = Service()
    reports = LengthReports(service)
    for n in range(MOST_AT_ONCE + 3):
        reports.add(report(n))
    await eventually(lambda: reports.sent == MOST_AT_ONCE + 3)
    assert service.got == list(range(MOST_AT_ONCE + 3))
    assert service.calls == 2
    await reports.close()


async def test_a_service_that_comes_back_learns_what_it_missed_of_late() -> None:
    service = Service(up=False)
    reports = LengthReports(service)
    for n in range(MOST_WAITING + 10):
        reports.add(report(n))
    await eventually(lambda: service.calls >= 2)
    service.up = True
    await eventually(lambda: reports.sent == MOST_WAITING)
    assert service.got == list(range(10, MOST_WAITING + 10))
    assert reports.dropped == 10
    await reports.close()


async def test_nothing_runs_while_there_is_nothing_to_report() -> None:
    reports = LengthReports(Service())
    before = len(asyncio.all_tasks())
    reports.add(report(1))
    await eventually(lambda: reports.sent == 1)
    await eventually(lambda: len(asyncio.all_tasks()) == before)
    await reports.close()


async def test_closing_while_the_service_is_away_waits_for_nobody() -> None:
    reports = LengthReports(Service(up=False))
    reports.add(report(1))
    async with asyncio.timeout(1):
        await reports.close()
