"""When an engine has failed a request, and what of its response is held until it is known whether another serves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine_adapter.asgi import BodyTooDeep
from engine_adapter.engine import EngineLost, EngineState, EngineUnreachable, Message, Send
from gateway.api.errors import ApiError, Headers
from gateway.policies.base import prefill_backlog
from gateway.requests.request import Request

OVERLOADED, FAILED = frozenset((429,)), frozenset((500, 502, 503, 504))
MISCONFIGURED = frozenset((401, 403, 404))
"""Statuses that no client causes on a generation route: the key is the gateway's, and the engine lists the model."""

SUSPECT_STATUSES = MISCONFIGURED | {500}
"""Statuses for which an engine is blamed only once another engine has served the same request. Otherwise requests that
fail everywhere would make every engine rest."""

MAX_HELD_BYTES = 64 << 10
"""Largest error response (bytes) that is held back. The body of a larger one is replaced by a short error."""

HUNG_AFTER, STUCK_AFTER = 10.0, 4.0
"""An engine counts as hung after this multiple of the predicted time, if it sends no token to any request meanwhile. A
single request counts as stuck after `STUCK_AFTER` times that, although others get tokens. Generous by convention."""

SOONEST_S = 1.0
"""Shortest time (s) to the first token after which an engine may count as hung, if a deadline allows no more."""


class EngineHung(EngineLost):
    """The engine accepted the request and sent nothing in time."""


@dataclass(slots=True, frozen=True)
class Failure:
    """An attempt that failed before the client was sent anything.

    Attributes:
        reason: one of a bounded set, for metrics and logs.
        retry_after_s: the rest that the engine asks for.
        blameless: the request may be the cause, so the engine is not blamed unless another engine serves it.
        unsent: the engine never received the request.
    """

    reason: str
    retry_after_s: float | None = None
    blameless: bool = False
    unsent: bool = False


def failure_of(error: BaseException | None, held: HeldResponse) -> Failure | None:
    """Return how an attempt failed that ended with ``error``, or with the response that ``held`` saw; None if not."""
    if isinstance(error, EngineUnreachable):
        return Failure("unreachable", unsent=True)
    if isinstance(error, EngineHung):
        return Failure("hung")
    if isinstance(error, EngineLost):
        return Failure("lost")
    if error is not None:
        # A body that cannot be encoded fails on every engine.
        return None if isinstance(error, BodyTooDeep) else Failure("error", blameless=True)
    if held.error is None:
        return None
    return Failure(held.reason, held.retry_after_s, held.status in SUSPECT_STATUSES)


def may_fail_over(status: int, headers: Headers, *, scheduled: bool = False, moves_on_404: bool) -> bool:
    """Whether an error response means that another engine should serve the request.

    ``scheduled``: the request generates tokens. ``moves_on_404``: another engine may have what the request names. A
    server that says ``x-should-retry: false`` means the request, not itself.
    """
    if status in OVERLOADED | FAILED:
        return not any(name.lower() == b"x-should-retry" and value == b"false" for name, value in headers)
    return moves_on_404 if status == 404 else scheduled and status in MISCONFIGURED


@dataclass(slots=True, eq=False)
class HeldResponse:
    """An engine's error response that the client is sent only if no other engine serves the request.

    Attributes:
        fails: whether a response with this status and these headers means that another engine should serve the request.
        can_move: whether another engine could serve it now. If not, the response is not held.
        error: the first message of such a response, held or not.
        active: the response is held.
        in_stream: it is an error event at the start of a 200 stream.
    """

    fails: Callable[[int, Headers], bool]
    can_move: Callable[[], bool]
    error: Message | None = None
    active: bool = False
    in_stream: bool = False
    _complete: bool = False
    _body: list[bytes] = field(default_factory=list)
    _size: int = 0

    def begin(self, start: Message, in_stream: bool = False) -> bool:
        """Note a response that begins with ``start``. Return whether it is held."""
        status: int = 500 if in_stream else start["status"]
        if self.error is None and status >= 400 and self.fails(status, start.get("headers", [])):
            self.error, self.in_stream = start, in_stream
            self.active = self.can_move()
        return self.active

    def add(self, message: Message) -> None:
        """Hold a part of the body. Of a body above `MAX_HELD_BYTES` only the size is kept."""
        body: bytes = message.get("body", b"")
        self._size += len(body)
        if self._size <= MAX_HELD_BYTES:
            self._body.append(body)
        else:
            self._body.clear()
        self._complete = not message.get("more_body", False)

    @property
    def status(self) -> int:
        """The status of the response."""
        return 0 if self.error is None else int(self.error["status"])

    @property
    def reason(self) -> str:
        """The reason of the failure, for metrics."""
        return "stream_error" if self.in_stream else f"http_{self.status}"

    @property
    def retry_after_s(self) -> float | None:
        """``Retry-After`` in seconds, if the response has it as a number."""
        for name, value in () if self.error is None else self.error.get("headers", ()):
            if name.lower() == b"retry-after" and value.isdigit() and len(value) < 8:
                return float(value)
        return None

    def release(self) -> list[Message] | ApiError:
        """Return the messages that are held, and hold no more; an error instead if it is too large or incomplete."""
        if not self.active or self.error is None:
            return []
        self.active = False
        if self._size > MAX_HELD_BYTES or not self._complete:
            message = f"The engine answered with status {self.status} and a body that cannot be forwarded."
            return ApiError(self.status if self.status >= 400 else 502, message, "engine_error", "engine_error")
        return [self.error, {"type": "http.response.body", "body": b"".join(self._body), "more_body": False}]


@dataclass(slots=True, eq=False)
class HangWatch:
    """Says when an engine that was sent a request counts as hung. Times are monotonic seconds.

    Attributes:
        request: the request.
        running: all requests on the engine.
        engine: its state.
        timeout_s: shortest time without a token after which the engine counts as hung.
        sent_at: when the request was sent.
        can_move: whether another engine could serve it now. Otherwise it is left where it is.
    """

    request: Request
    running: Mapping[str, Request]
    engine: EngineState
    timeout_s: float
    sent_at: float
    can_move: Callable[[], bool]
    _limit_s: float | None = None
    _produced: int = -1

    def wait_s(self, now: float) -> float:
        """Return the seconds until the next call of `is_hung`; infinite once the engine has answered."""
        request = self.request
        if request.first_token_s is not None or request.unobserved:
            return math.inf
        limit_s = self._limit_s or min(self.timeout_s, self._until_deadline_s())
        # Twice within the limit, because two looks show whether the engine sends tokens to others.
        periods = math.floor((now - self.sent_at) / (limit_s / 2) + 1e-6) + 1
        return self.sent_at + periods * limit_s / 2 - now

    def is_hung(self, now: float) -> bool:
        """Whether the engine is hung at ``now``. Call it whenever `wait_s` has passed."""
        if self.wait_s(now) == math.inf:
            return False
        if self._limit_s is None:
            predicted_s = HUNG_AFTER * prefill_backlog(self.running.values(), self.engine)
            self._limit_s = max(min(self.timeout_s, self._until_deadline_s()), predicted_s)
        produced = sum(request.generated for request in self.running.values())
        silent, self._produced = produced == self._produced, produced
        waited_s = now - self.sent_at + 1e-6
        overdue = waited_s >= self._limit_s and (silent or waited_s >= STUCK_AFTER * self._limit_s)
        return overdue and self.can_move()

    def _until_deadline_s(self) -> float:
        """Return half of the time that the deadline left when the request was sent. The other half is for a retry."""
        return max(SOONEST_S, (self.request.deadline_s - self.sent_at) / 2)


def holding(send: Send, held: HeldResponse) -> Send:
    """Return a ``send`` that lets ``held`` hold a response, and sends every other one at once."""

    async def send_or_hold(message: Message) -> None:
        if held.active:
            held.add(message)
        elif message["type"] != "http.response.start" or not held.begin(message):
            await send(message)

    return send_or_hold
