"""The interface between the gateway and an engine.

An engine is an ASGI app and a view of its state. The gateway calls ``engine.app`` with the client's request, so it
needs no engine-specific protocol. It passes a `TokenObserver` in the ASGI scope under `OBSERVER_KEY`; the engine
reports prompts and tokens to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine_adapter.model_card import ModelCard
from engine_adapter.step_report import Acceptance, GateReport, ReportLog, StepReport
from engine_adapter.step_time.model import StepTimeModel

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

OBSERVER_KEY = "antares.observer"
"""ASGI scope key under which the gateway passes a request's `TokenObserver` to the engine."""

FAILED_KEY = "antares.failed"
"""Key of an ``http.response.body`` message, true if its body reports that the engine failed inside a 200 response."""


PASS_EVENT_KEY = "antares.pass_event"
"""ASGI scope key of a `PassEvent`, with which an engine's app may send tokens at less cost than with its ``send``."""

PassEvent = Callable[[bytes, float], bool]
"""Sends one event of a stream at once: its bytes, and when they arrived (monotonic s). Returns False if it did not, and
the app must `send` the event.

The event has a token, neither ends the stream nor reports a failure, and all earlier ones were sent. The first token is
always sent by `send`."""

RENDERING_KEY = "antares.rendering"
"""ASGI scope key under which the gateway passes `RenderedPrompt.handle` back to the engine that rendered the prompt."""

UNKNOWN_MODEL_LEN = 1 << 30
"""Context length (tokens) of an engine that does not state it: no prompt is too long for it."""

XARGS_KEY = "antares.xargs"
"""ASGI scope key under which the gateway passes the members for the step gate to an in-process engine."""

TPOT_XARG = "antares_tpot_ms"
"""Member of ``vllm_xargs`` with a request's pace for the step gate: milliseconds per output token.

The pace comes from the TPOT bound, the end-to-end bound or both."""

KIND_XARG = "antares_kind"
"""The request's `ServiceKind` by its label, where it is not what `default_kind` derives from the pace."""

GATE_XARG = "antares_gate"
"""Member of ``vllm_xargs`` that names the step gate for a request (`gates.composite.GATES`)."""


class TokenObserver(Protocol):
    """Receives an engine's reports about one HTTP request.

    A request may have several sequences (``n > 1``, or several prompts). An opaque string identifies each one.
    Times are ``time.monotonic()`` seconds. Engines call these methods on the event loop's thread and on the hot path,
    so they must not block.
    """

    def on_prompt(self, sequence: str, tokens: int) -> None:
        """The engine has tokenised the prompt of ``sequence`` into ``tokens`` tokens."""

    def on_cached(self, sequence: str, tokens: int) -> None:
        """The engine took ``tokens`` tokens of the prompt of ``sequence`` from its prefix cache."""

    def on_tokens(self, sequence: str, count: int, at: float) -> None:
        """The engine produced ``count`` output tokens of ``sequence`` at time ``at``."""

    def on_unobserved(self) -> None:
        """The engine reports no tokens before the response is complete."""


@dataclass(slots=True, frozen=True)
class RenderedPrompt:
    """A prompt as its engine will compute it. Of several prompts in one request, the longest.

    Attributes:
        token_ids: the prompt; empty if it is not known.
        block_size: tokens of a block of the engine's prefix cache.
        media: position (in tokens) and content hash of each piece that is not text.
        handle: what the engine keeps for serving this request (`RENDERING_KEY`).
        invalid: the engine will answer the request with an error, whatever the load is.
    """

    token_ids: Sequence[int]
    block_size: int
    media: tuple[tuple[int, str], ...] = ()
    handle: object = None
    invalid: bool = False


@dataclass(slots=True, frozen=True)
class BlocksStored:
    """The engine stored prompt blocks of ``block_size`` tokens in its prefix cache.

    ``names`` are the engine's own names of them, in order, and ``parent`` that of the block before (None for the first
    of a prompt). ``adapter``: the LoRA adapter, "" for none. ``salt``: the prompt's cache salt, "" for none.
    """

    names: tuple[Hashable, ...]
    parent: Hashable | None
    token_ids: Sequence[int]
    block_size: int
    adapter: str = ""
    salt: str = ""


@dataclass(slots=True, frozen=True)
class BlocksRemoved:
    """The engine removed blocks from its prefix cache."""

    names: tuple[Hashable, ...]


@dataclass(slots=True, frozen=True)
class PrefixCacheCleared:
    """The engine's prefix cache is empty, or what it holds is not known any more."""


PrefixCacheEvent = BlocksStored | BlocksRemoved | PrefixCacheCleared


@dataclass(slots=True)
class EngineState:
    """A live view of one engine, read by policies and metrics. Sizes are in tokens, times in seconds.

    Attributes:
        alive: False while the engine is down or restarting.
        model: the name of the engine's default model, its first; "" if unknown.
        models: the models that the engine serves by name, LoRA adapters included. None until they are known. Empty if
            the engine does not list its models. A dead engine keeps them.
        aliases: names that clients may use, each with the engine's own name of that model.
        any_model: the engine also serves models that it does not list.
        why_down: why the engine does not serve, for operators. Only meaningful while ``alive`` is False.
        ready_in_s: expected wait until the engine is up again, while ``alive`` is False.
        hangs: times that the engine was found to compute no step although it had work.
        prefix_caching: the engine takes the beginning of a prompt from its KV memory if it is still there.
        handover_s: the gateway's own time between the admission of a request and its arrival in the engine (s). About
            one request in ten takes longer.
        last_step_at: when the engine last reported a step (monotonic s); None if it reports none.
        shared_tokens: prompt tokens that several running requests share in KV memory, beyond the first copy.
        plans_ahead: the engine schedules each step while the previous one runs (vLLM's asynchronous scheduling).
        reacts_late: the engine plans a step before it sees what the gateway sends in reaction to the tokens of the one
            before. False only in the simulator, where no time passes between two steps.
        foreign_sequences: sequences that the engine runs for others than this gateway, as far as it reports its queue.
            ``foreign_tokens``: their tokens of KV memory.
        foreign_decodes: the same, if the engine reports its steps. Else step times are learned from the gateway's own
            streams, so they contain the cost of foreign sequences.
        acceptance: accepted drafts, with speculative decoding.
    """

    alive: bool = False
    why_down: str = "it is starting"
    model: str = ""
    models: dict[str, ModelCard] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    any_model: bool = False
    ready_in_s: float = 30.0
    restarts: int = 0
    hangs: int = 0
    handover_s: float = 0.0
    last_step_at: float | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    kv_tokens: int = 0
    prefix_caching: bool = True
    shared_tokens: int = 0
    plans_ahead: bool = False
    reacts_late: bool = False
    kv_usage: float = 0.0
    engine_running: int = 0
    engine_waiting: int = 0
    foreign_sequences: int = 0
    foreign_tokens: float = 0.0
    foreign_decodes: int = 0
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    gate: GateReport = field(default_factory=GateReport)
    acceptance: Acceptance = field(default_factory=Acceptance)
    reports: ReportLog = field(default_factory=ReportLog)

    def observe_step(self, step: StepReport) -> None:
        """Learn from a step that the engine reports. Drafts (speculative decoding) are part of what a decode costs."""
        self.acceptance.observe(step)
        self.step_time.observe(step.decode_requests, step.prefill_tokens, step.mean_context, step.elapsed_s)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a request gets in a step on average; 1 without speculative decoding."""
        return self.acceptance.tokens_per_decode

    @property
    def reaction_steps(self) -> int:
        """Steps that the engine plans between the tokens of a step and a request that is admitted because of them."""
        return self.plans_ahead + self.reacts_late

    def set_models(self, cards: Iterable[ModelCard]) -> None:
        """Set the models that the engine serves. The first is its default."""
        self.models = {card.id: card for card in cards}
        self.model = next(iter(self.models), self.model)

    def own_name(self, model: str) -> str | None:
        """Return the engine's own name of the model that clients call ``model``; None if it does not list it."""
        aliases, models = self.aliases, self.models
        if aliases and (own := aliases.get(model)) is not None:
            return own if not models or own in models or self.any_model else None
        return model if models and model in models else None

    def adapter(self, own_name: str) -> str:
        """Return "" for the engine's default model, else the name: models and LoRA adapters share no cached prompts."""
        return "" if own_name == self.model else own_name

    @property
    def serves_any_model(self) -> bool:
        """Whether a request for a model that no engine lists may go to this engine."""
        return self.any_model or self.models == {}


@dataclass(slots=True)
class EngineEvents:
    """Callbacks that an engine invokes. All are optional."""

    on_step: Callable[[], None] = lambda: None
    """A step ended and the step-time model was updated."""
    on_alive: Callable[[bool], None] = lambda alive: None
    """The engine came up (True) or went down (False)."""
    on_prefix_cache: Callable[[Sequence[PrefixCacheEvent]], None] = lambda events: None
    """What the engine's prefix cache holds has changed. Only for an engine that reports it."""
    on_limits: Callable[[], None] = lambda: None
    """The engine is up, and its limits or the size of its KV memory became known only now."""


class Engine(Protocol):
    """One engine: its ASGI app, its state, and its lifecycle.

    ``app`` serves the OpenAI routes. If the engine dies during a request, ``app`` raises `EngineLost`, before or after
    the response started. If the engine never received the request, ``app`` raises `EngineUnreachable`. The caller
    turns either into a response. Cancelling a call to ``app`` frees all engine resources of the request.
    """

    name: str
    state: EngineState
    takes_xargs: bool
    """Whether a request's body takes its pace to the step gate, in ``vllm_xargs``.

    An engine in this process may read the same members from the scope instead (`XARGS_KEY`), for every route."""

    watches_disconnect: bool
    """Whether ``app`` ends a call by itself after ``http.disconnect``, which takes a moment.

    If not, the caller cancels the call at once: watching takes two more tasks for each request."""

    @property
    def app(self) -> ASGIApp:
        """The engine's OpenAI-compatible ASGI app."""

    async def start(self, events: EngineEvents) -> None:
        """Start the engine. Returns when it can serve. Raises `EngineStartError` with what to fix."""

    async def stop(self) -> None:
        """Stop the engine and all processes that it started. Idempotent."""

    async def render(self, path: str, document: dict[str, Any]) -> RenderedPrompt | None:
        """Return the prompt that ``document``, sent to ``path``, becomes; None if the engine cannot tell cheaply."""

    async def count_tokens(self, document: dict[str, Any]) -> int | None:
        """Return the size of the chat ``document`` in tokens, 0 if the engine refuses it; None if it cannot count.

        Only for an engine that does not `render`, to learn its tokenizer before any traffic.
        """

    async def probe(self) -> None:
        """Refresh the step-time model of an idle engine.

        The model learns from traffic. If its estimates make the policy reject every request, it gets no traffic, so
        wrong estimates would never be corrected.
        """

    def unsupported_reason(self, body: dict[str, Any]) -> str | None:
        """Why this engine cannot serve ``body`` (a parsed OpenAI request), naming the field. None if it can.

        May remove a field from ``body`` that has no effect on the response.
        """


class EngineLost(Exception):  # noqa: N818 - named after an event
    """The engine died, or the connection to it broke, while it held this request."""


class EngineUnreachable(EngineLost):
    """The engine was down before it received this request. The request can be queued again."""


class EngineStartError(Exception):
    """The engine could not start. The message says what to fix."""
