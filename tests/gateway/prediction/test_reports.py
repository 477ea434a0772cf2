"""Reports of actual output lengths: batching, retries and the bounded queue."""

from __future__ import annotations

import asyncio

import pytest

from gateway.prediction import reports as length_reports
from gateway.prediction.reports import MAX_BATCH, MAX_QUEUED, LengthReport, LengthReports, UnreachableError
from tests.fixtures.live_server import eventually


def report(n: int) -> LengthReport:
    return LengthReport(f"r{n}", "m", "chat", 10.0, 20.0, n, False)


class Service:
    """Accepts reports while ``up``."""

    def __init__(self, up: bool = True) -> None:
        self.up, self.received, self.calls = up, list[int](), 0

    async def __call__(self, reports: list[LengthReport]) -> None:
        self.calls += 1
        if not self.up:
            raise UnreachableError
        self.received += [report.tokens for report in reports]


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_reports, "BATCH_DELAY_S", 0.01)
    monkeypatch.setattr(length_reports, "RETRY_S", 0.01)


async def test_reports_are_sent_in_order_and_in_batches() -> None:
    service = Service()
    reports = LengthReports(service)
    for n in range(MAX_BATCH + 3):
        reports.add(report(n))
    await eventually(lambda: reports.sent == MAX_BATCH + 3)
    assert service.received == list(range(MAX_BATCH + 3))
    assert service.calls == 2
    await reports.close()


async def test_restarted_service_receives_the_newest_reports() -> None:
    service = Service(up=False)
    reports = LengthReports(service)
    for n in range(MAX_QUEUED + 10):
        reports.add(report(n))
    await eventually(lambda: service.calls >= 2)
    service.up = True
    await eventually(lambda: reports.sent == MAX_QUEUED)
    assert service.received == list(range(10, MAX_QUEUED + 10))
    assert reports.dropped == 10
    await reports.close()


async def test_sender_task_ends_when_the_queue_is_empty() -> None:
    reports = LengthReports(Service())
    before = len(asyncio.all_tasks())
    reports.add(report(1))
    await eventually(lambda: reports.sent == 1)
    await eventually(lambda: len(asyncio.all_tasks()) == before)
    await reports.close()


async def test_close_does_not_wait_for_an_unreachable_service() -> None:
    reports = LengthReports(Service(up=False))
    reports.add(report(1))
    async with asyncio.timeout(1):
        await reports.close()
