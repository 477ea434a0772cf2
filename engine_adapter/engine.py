"""The door between the gateway and whatever generates tokens.

An engine is an ASGI app plus a view of its state. The gateway never speaks an engine's own protocol: it calls
``engine.app`` with the client's request, and learns what the engine did with it through a `TokenObserver` that it puts
into the ASGI scope under `OBSERVER_KEY`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine_adapter.step_time.model import StepTimeModel

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

OBSERVER_KEY = "antares.observer"
"""ASGI scope key under which the gateway passes a request's `TokenObserver` to the engine."""


TPOT_XARG = "antares_tpot_ms"
"""Member of ``vllm_xargs`` that carries a request's TPOT bound (ms) to the step gate."""


KIND_XARG = "antares_kind"
"""The request's `ServiceKind` by its label, where it is not what `default_kind` derives from the pace."""

GATE_XARG = "antares_gate"
"""Member of ``vllm_xargs`` that names the step gate that paces a request (`gates.GATES`)."""


class TokenObserver(Protocol):
    """What an engine tells about one HTTP request while it serves it.

    One request may hold several sequences (``n > 1``, or several prompts), each named by an opaque string. All times
    are ``time.monotonic()`` seconds. Calls come from the event loop's thread, on the hot path: they must not block.
    """

    def on_prompt(self, sequence: str, tokens: int) -> None:
        """The engine has tokenised a sequence's prompt: ``tokens`` prompt tokens."""

    def on_tokens(self, sequence: str, count: int, at: float) -> None:
        """``count`` new output tokens of ``sequence`` came out of the engine at time ``at``."""

    def on_unobserved(self) -> None:
        """Of its tokens nothing will be told before the answer is complete."""


@dataclass(slots=True, frozen=True)
class StepReport:
    """One forward pass of the engine, as the step-time model learns from it.

    ``decode_requests`` sequences decoded one token each over a mean context of ``mean_context`` tokens (0 when not
    known), ``prefill_tokens`` prompt tokens rode along, and the step took ``elapsed_s`` seconds.
    """

    decode_requests: int
    prefill_tokens: int
    mean_context: float
    elapsed_s: float


@dataclass(slots=True)
class GateReport:
    """What the step gate inside the engine has counted since the engine started (cumulative).

    ``eligible`` and ``batched`` are keyed by the TPOT bound in milliseconds as text: decode opportunities of requests
    with that bound, and those in which the gate let them run. ``best_effort_preemptions``: how often a request made
    way for others
    (`engine_adapter.gates.best_effort_preemption`); ``preemptible``: whether any would, in this engine.
    """

    steps: int = 0
    gated_steps: int = 0
    gate_seconds: float = 0.0
    eligible: dict[str, int] = field(default_factory=dict)
    batched: dict[str, int] = field(default_factory=dict)
    best_effort_preemptions: int = 0
    preemptible: bool = False


@dataclass(slots=True)
class EngineState:
    """A live view of one engine, read by policies and metrics. Sizes in tokens, times in seconds.

    ``alive`` is False while the engine is down or restarting; ``ready_in_s`` is then the expected wait. ``model``
    is the name the engine serves its model under ("" when unknown). ``plans_ahead``: each step is decided on while the
    one before it runs, as with vLLM's asynchronous scheduling.
    """

    alive: bool = False
    model: str = ""
    ready_in_s: float = 30.0
    restarts: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    kv_tokens: int = 0
    plans_ahead: bool = False
    kv_usage: float = 0.0
    engine_running: int = 0
    engine_waiting: int = 0
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    gate: GateReport = field(default_factory=GateReport)


@dataclass(slots=True)
class EngineEvents:
    """What an engine calls when something happens that a dispatcher may want to act on. All optional."""

    on_step: Callable[[], None] = lambda: None
    """A step ended and the step-time model has learnt from it."""
    on_alive: Callable[[bool], None] = lambda alive: None
    """The engine came up (True) or went down (False)."""


class Engine(Protocol):
    """One engine: its HTTP face, its state, its life.

    ``app`` serves the OpenAI routes. When the engine is lost while it serves, ``app`` raises `EngineLost` (before or
    after the response started), or `EngineUnreachable` if it never took the request; the caller turns that into an
    answer. Cancelling a call to ``app``, or delivering
    ``http.disconnect`` to its ``receive``, frees everything the request held in the engine.
    """

    name: str
    state: EngineState
    takes_xargs: bool
    """Whether the engine reads ``vllm_xargs``, which carry a request's TPOT bound to the step gate."""

    @property
    def app(self) -> ASGIApp:
        """The engine's OpenAI-compatible ASGI app."""

    async def start(self, events: EngineEvents) -> None:
        """Bring the engine up; returns when it can serve. Raises `EngineStartError` with what to fix."""

    async def stop(self) -> None:
        """Stop the engine and everything that it started. Idempotent."""

    def count_tokens(self, text: str) -> int | None:
        """Tokens in ``text`` by the engine's own tokenizer, or None when it has none at hand."""

    async def probe(self) -> None:
        """The engine is idle, yet the step-time model has requests refused: make the model current.

        A model learns from traffic; one that has come to refuse everything would never learn better.
        """

    def unsupported_reason(self, body: dict[str, Any]) -> str | None:
        """Why this engine cannot serve ``body`` (a parsed OpenAI request) safely, naming the field; None if it can.

        May drop a field from ``body`` that has no effect on the answer.
        """


class EngineLost(Exception):  # noqa: N818 - it names what happened, as an event does
    """The engine died, or the connection to it broke, while it held this request."""


class EngineUnreachable(EngineLost):
    """The engine was down before it took this request; nothing happened to it, and it can be queued again."""


class EngineStartError(Exception):
    """The engine could not start; the message says what to fix."""
