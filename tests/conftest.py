"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# "quick" keeps the suite without an engine at about a minute on two busy cores. `--hypothesis-profile=thorough` runs
# more examples. CI runs the same examples every time, so that a failure is due to the change and not to chance.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize="CI" in os.environ)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("quick")
