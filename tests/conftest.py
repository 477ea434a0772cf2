"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# The suite without an engine is to take about a minute on two busy cores; `--hypothesis-profile=thorough` for more.
# CI tries the same examples every time: what it says is about the change, not about chance.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize="CI" in os.environ)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("quick")
