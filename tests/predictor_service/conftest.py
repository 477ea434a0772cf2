"""Fixtures of the predictor's tests."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.fixtures.untraced import untraced


@pytest.fixture(scope="session")
def lightgbm() -> ModuleType:
    """LightGBM, imported only by the test process that needs it, and not when tests are collected."""
    with untraced():
        return pytest.importorskip("lightgbm")
