"""How a request leaves the queue of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.policies.base import Rejection


@dataclass(slots=True, frozen=True)
class EngineDown:
    """The engine is down and will not be back in time for this request."""

    retry_after_s: float


@dataclass(slots=True, frozen=True)
class Draining:
    """The gateway shuts down: the request can be sent again to another gateway, or to this one after a restart."""


@dataclass(slots=True, frozen=True)
class QueueFull:
    """The queue of the request's class is at its limit."""

    limit: int
    retry_after_s: float


@dataclass(slots=True, frozen=True)
class Admitted:
    """The engine serves the request; its first token is predicted ``predicted_ttft_s`` after arrival."""

    predicted_ttft_s: float | None


@dataclass(slots=True, frozen=True)
class Reroute:
    """This engine is down or rests, and another one can serve the request: place it again."""


QueueOutcome = Reroute | Admitted | Rejection | EngineDown | Draining | QueueFull
