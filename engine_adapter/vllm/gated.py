"""What the step gate knows of vLLM's requests: kind, pace and gate from their xargs, and their state in this step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_adapter.engine import GATE_XARG, KIND_XARG, TPOT_XARG
from engine_adapter.gates.pace_labels import PaceLabels
from engine_adapter.gates.phase import is_prefilling, tokens_left
from engine_adapter.service_kind import KINDS_BY_LABEL, ServiceKind, default_kind

if TYPE_CHECKING:
    from collections.abc import Container

    from vllm.v1.request import Request

_MIN_PACE_MS = 1.0
"""Milliseconds. No engine decodes faster, and a smaller pace would starve all others (TRP is relative to it)."""

_SPARE = 64
"""Ended requests that are kept, beside one for each request in the engine, before all ended ones are dropped."""


@dataclass(slots=True)
class Gated:
    """A request as the gate sees it (`gates.base.Decoding`). ``label`` names its pace in the counters."""

    request_id: str
    kind: ServiceKind
    pace_s: float | None
    gate: str
    label: str
    length: int = 0
    drafts: int = 0


class GatedRequests:
    """The requests of one scheduler. ``forget`` is called with the ids of those that have ended."""

    def __init__(self, forget: Callable[[str], None]) -> None:
        self._known: dict[str, Gated] = {}
        self._labels = PaceLabels()
        self._forget = forget

    def of(self, request: Request) -> Gated:
        """Return what the gate knows of ``request``. The first time, that is read from its xargs."""
        known = self._known.get(request.request_id)
        if known is None:
            known = self._known[request.request_id] = self._read(request)
        return known

    def drop_ended(self, present: Container[str], count: int) -> None:
        """Drop requests that are not among the ``count`` that are ``present``, now and then."""
        if len(self._known) > 2 * count + _SPARE:
            for request_id in [known for known in self._known if known not in present]:
                del self._known[request_id]
                self._forget(request_id)

    def _read(self, request: Request) -> Gated:
        xargs = (request.sampling_params and request.sampling_params.extra_args) or {}
        given = xargs.get(TPOT_XARG)
        # A pace of 0 or infinity would give some request a TRP of 0, which never decodes again.
        pace_ms: float | None = None
        if isinstance(given, int | float) and 0 < given < math.inf:
            pace_ms = max(_MIN_PACE_MS, given)
        pace_s = None if pace_ms is None else pace_ms / 1000
        return Gated(
            request_id=request.request_id,
            kind=KINDS_BY_LABEL.get(str(xargs.get(KIND_XARG)), default_kind(pace_s)),
            pace_s=pace_s,
            gate=str(xargs.get(GATE_XARG, "")),
            label=self._labels.of(pace_ms),
        )


def left(request: Request) -> int:
    """Return the tokens of ``request`` that remain to be computed, without drafts."""
    return tokens_left(request.num_tokens, request.num_computed_tokens, request.num_output_placeholders)


def prefilling(request: Request) -> bool:
    """Whether the next step of ``request`` computes a chunk."""
    return is_prefilling(left(request), request.num_computed_tokens, request.num_prompt_tokens)
