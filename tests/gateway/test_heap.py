"""When full garbage collections run."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from gateway import heap
from gateway.heap import MOST_YOUNG, QUIET, YOUNG, YOUNG_OBJECTS, FullCollections, collecting_when_quiet
from tests.fixtures.live_server import eventually


class ScriptedCollector:
    """Stands for Python's collector: ``young`` collections since the last full one, which finds ``found`` objects."""

    def __init__(self) -> None:
        self.young, self.found, self.full = 0, 0, 0

    def get_count(self) -> tuple[int, int, int]:
        return (0, 0, self.young)

    def get_threshold(self) -> tuple[int, int, int]:
        return (YOUNG_OBJECTS, 10, 10)

    def collect(self) -> int:
        self.young, self.full = 0, self.full + 1
        return self.found


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> ScriptedCollector:
    scripted = ScriptedCollector()
    monkeypatch.setattr(heap, "gc", scripted)
    return scripted


@pytest.mark.parametrize(
    ("open_requests", "young", "due"),
    [
        (0, YOUNG - 1, False),
        (0, YOUNG, True),
        (QUIET, YOUNG, True),
        (QUIET + 1, YOUNG, False),
        (10_000, MOST_YOUNG - 1, False),
        (10_000, MOST_YOUNG, True),
    ],
)
def test_full_collection_waits_for_a_quiet_moment(
    collector: ScriptedCollector, open_requests: int, young: int, due: bool
) -> None:
    collector.young = young
    assert FullCollections(lambda: open_requests).check() is due
    assert collector.full == due


def test_collections_that_find_little_become_rare_and_useful_ones_do_not(collector: ScriptedCollector) -> None:
    collections = FullCollections(lambda: 10_000)
    for expected in (MOST_YOUNG, 2 * MOST_YOUNG, 4 * MOST_YOUNG):
        collector.young = expected - 1
        assert not collections.check()
        collector.young = expected
        assert collections.check()
    collector.young, collector.found = 8 * MOST_YOUNG, 10**9
    assert collections.check()
    collector.young = MOST_YOUNG
    assert collections.check()


@pytest.fixture
def untouched_collector() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


async def test_collector_gets_its_settings_back(untouched_collector: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "CHECK_S", 0.01)
    before = gc.get_threshold()
    full_before = gc.get_stats()[2]["collections"]
    async with collecting_when_quiet(lambda: 0):
        assert gc.get_freeze_count() > 1000
        assert gc.get_threshold()[:2] == (YOUNG_OBJECTS, before[1])
        for _ in range(YOUNG + 2):
            gc.collect(1)
        await eventually(lambda: gc.get_stats()[2]["collections"] >= full_before + 2)
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
