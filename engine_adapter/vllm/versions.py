"""Which vLLM versions this package knows. vLLM's scheduler interface is not public, so the range is guarded."""

from __future__ import annotations

import re

GATE_VERSIONS = ((0, 26), (0, 33))
"""Half-open range in which the step gate's hooks were read in the source; run on 0.32.0."""

PREEMPTION_VERSIONS = ((0, 32), (0, 33))
"""Half-open range in which a request may be preempted between steps, its latest token on its way; run on 0.32.0."""

IN_PROCESS_VERSIONS = ((0, 29), (0, 33))
"""Half-open range in which the in-process engine's entry points exist; run on 0.32.0."""


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is outside the range that a part of Antares supports."""


def within(version: str, supported: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether ``version`` (e.g. "0.32.0+cpu") is in the half-open range ``supported``."""
    match = re.match(r"(\d+)\.(\d+)", version)
    low, high = supported
    return match is not None and low <= (int(match[1]), int(match[2])) < high


def require(version: str, supported: tuple[tuple[int, int], tuple[int, int]], part: str) -> None:
    """Raise `UnsupportedVllmError` unless ``version`` is in the half-open range ``supported``."""
    if not within(version, supported):
        low, high = supported
        raise UnsupportedVllmError(
            f"{part} supports vLLM >={low[0]}.{low[1]},<{high[0]}.{high[1]}, but vLLM {version} is installed. "
            f"Install a supported version, or run vLLM as its own server and point Antares at it "
            f"(engine.kind: http; see configs/remote.yaml)."
        )
