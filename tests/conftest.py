"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# The suite without an engine is to take under a minute on two busy cores; `--hypothesis-profile=thorough` for more.
settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("quick")
