"""The price of isolation: what the larger of two ordinary tenants loses."""

from __future__ import annotations

import pytest

from benchmarks.isolation import price

pytestmark = pytest.mark.study


def test_shares_cost_nothing_below_capacity_and_the_larger_tenant_above() -> None:
    below = [price.split(15.0, 0, shares) for shares in (True, False)]
    assert below[0] == below[1]
    shared, alone = (price.split(40.0, 0, shares) for shares in (True, False))
    assert shared.smaller > alone.smaller
    assert shared.larger < alone.larger


def test_rows_have_medians_for_each_load() -> None:
    found = price.rows([15.0], [0, 1], jobs=1)
    assert [row[:2] for row in found] == [["15", "with"], ["15", "without"]]
    assert all(0 <= float(cell) <= 1 for row in found for cell in row[2:4])
