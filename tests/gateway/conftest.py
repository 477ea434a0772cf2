from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fixtures.live_gateway import Live, live


@pytest.fixture
async def antares() -> AsyncIterator[Live]:
    """A gateway with the default policy and a fast simulated engine."""
    async with live() as served:
        yield served
