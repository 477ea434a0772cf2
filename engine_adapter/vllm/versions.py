"""Supported vLLM versions. NOTE: vLLM's scheduler interface is not public, so each part checks its version range."""

from __future__ import annotations

import re

GATE_VERSIONS = ((0, 26), (0, 33))
"""Half-open range for the step gate: its hooks exist in the source of these versions. Tested on 0.32.0."""

PREEMPTION_VERSIONS = ((0, 32), (0, 33))
"""Half-open range in which a request can be preempted between steps while a token is in flight. Tested on 0.32.0."""

IN_PROCESS_VERSIONS = ((0, 29), (0, 33))
"""Half-open range in which the in-process engine's entry points exist. Tested on 0.32.0."""


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM version is not supported."""


def within(version: str, supported: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether ``version`` (e.g. "0.32.0+cpu") is in the half-open range ``supported``."""
    match = re.match(r"(\d+)\.(\d+)", version)
    low, high = supported
    return match is not None and low <= (int(match[1]), int(match[2])) < high


def require_in_process(version: str) -> None:
    """Raise `UnsupportedVllmError` if the in-process engine does not support vLLM ``version``."""
    _require(
        version,
        IN_PROCESS_VERSIONS,
        "The in-process engine",
        "run vLLM as its own server and point Antares at it (engines: kind: http; see configs/remote.yaml)",
    )


def require_gate(version: str) -> None:
    """Raise `UnsupportedVllmError` if the step gate does not support vLLM ``version``.

    Only a server that was started apart from the gateway gets this error: the in-process range is narrower.
    """
    _require(
        version,
        GATE_VERSIONS,
        "The Antares step gate",
        "start the server without --scheduler-cls and set send_slo: false",
    )


def _require(version: str, supported: tuple[tuple[int, int], tuple[int, int]], part: str, alternative: str) -> None:
    if not within(version, supported):
        low, high = supported
        raise UnsupportedVllmError(
            f"{part} supports vLLM >={low[0]}.{low[1]},<{high[0]}.{high[1]}, but vLLM {version} is installed. "
            f"Install a supported version, or {alternative}."
        )
