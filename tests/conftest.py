"""Settings for all tests."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import settings

# "quick" keeps the suite without an engine at about a minute on two busy cores. `--hypothesis-profile=thorough` runs
# more examples. CI runs the same examples every time, so that a failure is due to the change and not to chance.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize="CI" in os.environ)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("quick")


SHARED = ("tests/e2e/clients/", "tests/engine_adapter/vllm/")
"""Folders whose tests share an engine, or the import of vLLM, which takes 10 s. So one process runs all of them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return the scheduler of ``--dist loadfile``, which keeps the tests of a file or of a `SHARED` folder together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in SHARED if nodeid.startswith(folder)), super()._split_scope(nodeid))

    return Scheduling(config, log)
