"""Supported vLLM versions. NOTE: what we use of vLLM is not public, so each part checks its range, and what it uses.

`interface.py` says what that is. A test checks it in the source of every version in these ranges.
"""

from __future__ import annotations

import re

from engine_adapter.vllm.interface import GATE, IN_PROCESS, PREEMPTION, Uses, missing
from engine_adapter.vllm.sources import Members, installed

Range = tuple[tuple[int, int], tuple[int, int]]

GATE_VERSIONS: Range = ((0, 26), (0, 34))
"""Half-open range for the step gate. The scheduler was stepped on 0.26, 0.29, 0.31, 0.32 and 0.33, engines on 0.32."""

PREEMPTION_VERSIONS: Range = ((0, 31), (0, 34))
"""Half-open range in which a request can be preempted between steps while a token is in flight. Stepped on all."""

IN_PROCESS_VERSIONS: Range = ((0, 30), (0, 33))
"""Half-open range for the in-process engine. Run on 0.32."""

USES: dict[str, tuple[Range, Uses]] = {
    "gate": (GATE_VERSIONS, GATE),
    "preemption": (PREEMPTION_VERSIONS, PREEMPTION),
    "in_process": (IN_PROCESS_VERSIONS, IN_PROCESS),
}
"""For each part its versions, and what it uses of them."""

_MAX_NAMED = 5
"""Bounds the length of the message: missing names that it lists."""


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM version is not supported."""


def within(version: str, supported: Range) -> bool:
    """Whether ``version`` (e.g. "0.32.0+cpu") is in the half-open range ``supported``."""
    match = re.match(r"(\d+)\.(\d+)", version)
    low, high = supported
    return match is not None and low <= (int(match[1]), int(match[2])) < high


def require_in_process(version: str, members: Members | None = None) -> None:
    """Raise `UnsupportedVllmError` if the in-process engine does not support vLLM ``version``.

    ``members``: what that version has; default: the installed vLLM is read.
    """
    _require(
        version,
        "in_process",
        members,
        "The in-process engine",
        "run vLLM as its own server and point Antares at it (engines: kind: http; see configs/remote.yaml)",
    )


def require_gate(version: str, members: Members | None = None) -> None:
    """Raise `UnsupportedVllmError` if the step gate does not support vLLM ``version``; as `require_in_process`.

    Only a server that was started apart from the gateway gets this error: the in-process range is narrower.
    """
    _require(
        version,
        "gate",
        members,
        "The Antares step gate",
        "start the server without --scheduler-cls and set send_slo: false",
    )


def _require(version: str, part: str, members: Members | None, title: str, alternative: str) -> None:
    supported, uses = USES[part]
    lacks = missing(uses, members or installed().members)
    if within(version, supported) and not lacks:
        return
    low, high = supported
    if lacks:
        more = f" and {len(lacks) - _MAX_NAMED} more" if len(lacks) > _MAX_NAMED else ""
        why = f"It lacks {', '.join(lacks[:_MAX_NAMED])}{more}. "
    else:
        why = f"It has all names that {title[0].lower()}{title[1:]} uses, but was not tested. "
    raise UnsupportedVllmError(
        f"{title} supports vLLM >={low[0]}.{low[1]},<{high[0]}.{high[1]}, but vLLM {version} is installed. {why}"
        f"Install a supported version, or {alternative}."
    )
