"""One gateway for all tests of this folder, because a real vLLM takes most of a minute to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import serve_tools


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = serve_tools(tmp_path_factory.mktemp("clients"))
    yield running
    running.stop()
