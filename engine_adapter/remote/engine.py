"""Uses any OpenAI-compatible server as an engine: a reverse proxy, health probes, and a step-time model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from engine_adapter.asgi import encode_json
from engine_adapter.engine import (
    UNKNOWN_MODEL_LEN,
    ASGIApp,
    EngineEvents,
    EngineLost,
    EngineStartError,
    EngineState,
    RenderedPrompt,
)
from engine_adapter.model_card import ModelCard, read_cards
from engine_adapter.remote.client import Upstream
from engine_adapter.remote.proxy import HttpProxy
from engine_adapter.remote.reports import ReportAddress, Reports
from engine_adapter.server_url import server_url
from engine_adapter.step_time.curve import StepCurve
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel

log = logging.getLogger("antares.engine.http")

PROBE_EVERY_S = 2.0
"""Seconds between health probes while the server answers."""
PROBE_AGAIN_S = (0.25, 0.5, 1.0, 2.0, 5.0)
"""Seconds before each further probe of a server that does not answer; the last value repeats."""
PROBE_AT_ONCE_S = 0.05
"""Expected downtime (s) right after a failed connection. The next probe runs at once and may find the server up again,
so requests wait that long before they are rejected."""
PROBE_TIMEOUT_S = 2.0
"""Seconds within which a probe must be answered."""
DOWN_AFTER_PROBES, DOWN_AFTER_S = 3, 5.0
"""Failed probes in a row, and the seconds that they span, after which the server is down and its requests end."""
BREAK_SETTLE_S = 0.05
"""Delay (s) between a broken connection and the probe: one probe then covers all connections that break together."""
MODELS_EVERY_S = 30.0
"""Seconds between two readings of the server's models. LoRA adapters can be loaded at run time."""
XARGS_OWNERS = ("vllm", "antares")
"""``owned_by`` of servers that accept ``vllm_xargs``. Other servers may reject a request with an unknown field."""

_NO_SUCH_ROUTE = frozenset((404, 405, 501))

PASS_THROUGH_CONNECTIONS = 256
"""Connections for requests that are not scheduled, beside one per sequence; convention."""

_SINGLE_REQUEST_STEPS = ((1, 0, 0), (0, 0, 512))
"""Steps of an engine with a single request: (decodes, decode context, prefill tokens)."""


class HttpEngine:
    """A remote OpenAI-compatible server. Implements `engine_adapter.engine.Engine`.

    Requests and responses pass through unchanged, with these exceptions:

    * Hop-by-hop headers and the client's credentials are not sent. Its SLO is not sent unless ``send_slo``.
    * Streamed completions are requested with usage. The client sees the usage chunk only if it asked for it.
    * With ``first_token="stream"``, a non-streaming completion is requested as a stream and assembled here, so that
      its first token is observed on time. `assemble.NOT_REBUILDABLE` lists the exceptions.

    Args:
        name: the engine's name in metrics.
        base_url: the server's URL; a trailing ``/v1`` is removed.
        api_key: the server's own key, sent as a bearer token.
        models: the models that the server serves; by default those in its ``/v1/models``.
        aliases: names that clients of the gateway may use, each with the server's own name of that model.
        any_model: send the server requests for models that no engine lists.
        max_num_seqs, max_num_batched_tokens: the server's limits. OpenAI-compatible servers do not report them.
        max_model_len: the server's context length, unless ``/v1/models`` reports it. None: not known.
        prefix_caching: the server has a prefix cache, as vLLM has by default.
        step_times: initial step times; refined from the timing of the streams.
        connect_timeout_s: maximum time to establish a connection.
        read_timeout_s: maximum time between two reads.
        max_connections: maximum requests in flight, at least 2; further ones wait. By default one per sequence, and
            `PASS_THROUGH_CONNECTIONS` for requests that generate no tokens. A smaller number lowers ``max_num_seqs``,
            so that no policy admits a request that would wait for a connection. Health probes use a separate one.
        first_token: how the first token of a non-streaming completion is observed.
        send_slo: send ``x-slo-*`` headers and the ``antares_*`` members of ``vllm_xargs`` to the server.
        report: where the server's scheduler class reports its steps.

    Raises:
        ValueError: ``base_url`` is not an http or https URL, or holds credentials.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        api_key: str | None = None,
        *,
        models: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        any_model: bool = False,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        prefix_caching: bool = True,
        step_times: StepTimes | None = None,
        connect_timeout_s: float = 5,
        read_timeout_s: float = 600,
        max_connections: int | None = None,
        first_token: Literal["stream", "none"] = "stream",
        send_slo: bool = True,
        report: ReportAddress | None = None,
    ) -> None:
        self.name = name
        self.base_url = server_url(base_url)
        self._initial_times = step_times or StepTimes()
        total = max_connections or max_num_seqs + PASS_THROUGH_CONNECTIONS
        max_num_seqs = max(1, min(max_num_seqs, total - 1))
        connections = (max_num_seqs, max(1, total - max_num_seqs))
        if report is not None and max_connections is None:
            # Each request that is preempted keeps its connection.
            connections = (2 * max_num_seqs, PASS_THROUGH_CONNECTIONS)
        self.state = EngineState(
            aliases=dict(aliases or {}),
            any_model=any_model,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len or UNKNOWN_MODEL_LEN,
            prefix_caching=prefix_caching,
            reacts_late=True,
            step_time=StepTimeModel(times=self._initial_times),
        )
        self.takes_xargs = self._is_vllm = False
        self.watches_disconnect = False
        self._api_key = api_key
        self._send_slo = send_slo
        self._probe_timeout_s = min(connect_timeout_s, PROBE_TIMEOUT_S)
        self._upstream = Upstream(name, self.base_url, connect_timeout_s, read_timeout_s)
        # A separate pool: a probe that waits for a request's connection would report a busy server as dead.
        self._probe_upstream = Upstream(name, self.base_url, connect_timeout_s, read_timeout_s, keep_alive=False)
        self._probe_now = asyncio.Event()
        self._proxy = HttpProxy(
            upstream=self._upstream,
            name=name,
            state=self.state,
            api_key=api_key,
            connections=connections,
            see_first_token=first_token == "stream",
            send_slo=send_slo,
            on_unreachable=self._on_unreachable,
            on_broken=self._on_broken,
            on_unauthorized=self._on_unauthorized,
        )
        self._reports = Reports(
            name,
            self.state,
            self._proxy,
            None
            if report is None
            else (report.host or urlsplit(self.base_url).hostname or "", report.port, report.key),
            lambda: self.takes_xargs and connections[0] >= 2 * self.state.max_num_seqs,
        )
        self._events = EngineEvents()
        self._health_path, self._has_health = "/health", False
        self._models = tuple(models)
        self._models_due_s = 0.0
        self._key_is_checked = self._is_silent = False
        self._watcher: asyncio.Task[None] | None = None

    @property
    def app(self) -> ASGIApp:
        """The reverse proxy."""
        return self._proxy

    async def start(self, events: EngineEvents) -> None:
        """Probe the server once, then start the periodic health probes.

        A server that does not answer yet is not an error, because Antares does not start it. ``state.alive`` stays
        False until it answers. Raises `EngineStartError` if the server rejects the key.
        """
        self._events = self._proxy.events = self._reports.events = events
        try:
            await self._probe()
        except EngineStartError:
            await self.stop()
            raise
        if not self.state.alive:
            log.warning("engine %s is not ready, waiting for it: %s", self.name, self._why_down)
        self._reports.start()
        self._watcher = asyncio.create_task(self._watch(), name=f"{self.name}-health")

    async def stop(self) -> None:
        """Stop the probes and close all connections. Requests in flight get `EngineLost`. Idempotent."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        await self._reports.stop()
        self.state.alive = False
        await asyncio.gather(self._upstream.close(), self._probe_upstream.close())

    async def render(self, path: str, document: dict[str, Any]) -> RenderedPrompt | None:
        """Returns None: only the server has the tokenizer."""
        return None

    async def count_tokens(self, document: dict[str, Any]) -> int | None:
        """Return the size of a chat as vLLM's ``/tokenize`` counts it. Other servers are not asked."""
        if not self._is_vllm:
            return None
        body: dict[str, Any] = {"model": self.state.model, "messages": document["messages"]}
        if "tools" in document:
            body["tools"] = document["tools"]
        headers = [(b"content-type", b"application/json")]
        if self._api_key:
            headers.append((b"authorization", f"Bearer {self._api_key}".encode()))
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                with await self._upstream.send("POST", b"/tokenize", headers, encode_json(body)) as answer:
                    if answer.status in (400, 422):
                        return 0
                    count = orjson.loads(await answer.read_all())["count"] if answer.status == 200 else None
        except (EngineLost, TimeoutError, ValueError, LookupError, TypeError):
            return None
        return count if isinstance(count, int) and count > 0 else None

    async def probe(self) -> None:
        """Reset the step-time model to the initial step times. A remote server gets no synthetic requests.

        Only if they are faster for a single request. Otherwise the policy would reject more requests, not fewer.
        """
        initial, current = StepCurve.of(self._initial_times), self.state.step_time.curve
        if any(initial.step_s(*step) < current.step_s(*step) for step in _SINGLE_REQUEST_STEPS):
            self.state.step_time.start_over(self._initial_times)

    def unsupported_reason(self, body: dict[str, Any]) -> str | None:
        """Returns None: the server rejects what it does not support."""
        return None

    @property
    def _why_down(self) -> str:
        return self.state.why_down

    @_why_down.setter
    def _why_down(self, why: str) -> None:
        # Its readers put the engine's name in front.
        self.state.why_down = why.removeprefix(f"engine {self.name} at ")

    def _on_unreachable(self) -> None:
        """Mark the server as down, so that new requests wait or go to another engine, and probe it at once.

        The outage may be momentary.
        """
        if self.state.alive:
            self._why_down = f"no connection to {self.base_url}"
            self._set_alive(False, ready_in_s=PROBE_AT_ONCE_S)
            self._probe_now.set()

    def _on_broken(self) -> None:
        """Probe the server after a broken connection, unless it is known to be down."""
        if self.state.alive:
            self._probe_now.set()

    def _on_unauthorized(self) -> None:
        """Have the next probe check the key, because a request was rejected for it."""
        self._key_is_checked = False

    async def _watch(self) -> None:
        failures = 0 if self.state.alive else 1
        failing_since = time.monotonic()
        while True:
            pause = PROBE_AGAIN_S[min(failures, len(PROBE_AGAIN_S)) - 1] if failures else PROBE_EVERY_S
            self.state.ready_in_s = pause if failures else 0.0
            with contextlib.suppress(TimeoutError):
                # NOTE: Python 3.11's `wait_for` drops a cancellation that comes together with what it waits for.
                async with asyncio.timeout(pause):
                    await self._probe_now.wait()
                if self.state.alive:
                    await asyncio.sleep(BREAK_SETTLE_S)
            self._probe_now.clear()
            if not failures:
                failing_since = time.monotonic()
            was_alive, reason = self.state.alive, self._why_down
            try:
                await self._probe()
            except EngineStartError as error:
                self._why_down = str(error)
                self._set_alive(False)
            if not self.state.alive and (was_alive or self._why_down != reason):
                log.warning("engine %s is not ready: %s", self.name, self._why_down)
            failures = 0 if self.state.alive else failures + 1
            if self.state.alive and self._is_vllm:
                await self._reports.read_metrics(self._get)
            self._end_hung_requests()
            if failures >= DOWN_AFTER_PROBES and time.monotonic() - failing_since >= DOWN_AFTER_S:
                self._end_requests(failing_since)

    def _end_hung_requests(self) -> None:
        """End what is in flight on a server that answers probes, but has sent its streams nothing for too long."""
        was_silent, self._is_silent = self._is_silent, self._proxy.is_silent(self._reports.progress_at)
        # Twice in a row, because a gateway that was itself stopped has not yet read what the server sent.
        if self._is_silent and was_silent:
            self.state.hangs += 1
            ended = self._upstream.end_requests("it hangs: its streams have begun, and it sends nothing")
            log.error("engine %s hangs: ended %d requests in flight", self.name, ended)

    def _end_requests(self, failing_since: float) -> None:
        """End what is in flight on a server that is down since ``failing_since`` (monotonic s).

        A server that still sends tokens is not down: it may be stopping, and accept no more connections.
        """
        if self._proxy.last_data_at < failing_since:
            ended = self._upstream.end_requests(f"it is down: {self._why_down}")
            if ended:
                log.warning("engine %s is down: ended %d requests in flight", self.name, ended)

    async def _probe(self) -> None:
        """Check the server's health. Read its models, and so check the key, if it has just come up or at times.

        Raises `EngineStartError` if the server rejects the key. NOTE: many servers want no key for ``/health``.
        """
        began = time.monotonic()
        status = await self._status(self._health_path)
        if status in _NO_SUCH_ROUTE and self._health_path == "/health":
            # Not vLLM. Every OpenAI-compatible server lists its models.
            self._health_path = "/v1/models"
            status = await self._status(self._health_path)
        if status == 200:
            self._has_health = True
        elif status in _NO_SUCH_ROUTE and self._models and not self._has_health:
            # It has neither route, and never had. That it answers is all that can be known.
            status = 200
        self._check_key(self._health_path, status)
        if status is None and self.state.alive and self._proxy.last_data_at > began:
            # It was too busy to answer, but sent data to others meanwhile.
            return
        alive = status == 200
        if alive and not (self.state.alive and self._key_is_checked and began < self._models_due_s):
            await self._read_models()
        self._set_alive(alive)

    def _check_key(self, path: str, status: int | None) -> None:
        if status in (401, 403):
            fix = "check the key in the variable that its api_key_env names"
            if not self._api_key:
                fix = "set its api_key_env to the name of the environment variable with the server's key"
            raise EngineStartError(f"engine {self.name} at {self.base_url}: {path} returned {status}: {fix}")

    async def _status(self, path: str) -> int | None:
        answer = await self._get(path)
        if answer is not None and answer[0] != 200:
            self._why_down = f"{self.base_url}{path} returned {answer[0]}"
        return None if answer is None else answer[0]

    async def _get(self, path: str) -> tuple[int, bytes] | None:
        """Status and body of a GET, or None if there is no answer.

        It uses a new connection, because a probe also tests that the server accepts connections.
        """
        headers = []
        if self._api_key:
            headers.append((b"authorization", f"Bearer {self._api_key}".encode()))
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                with await self._probe_upstream.send("GET", path.encode(), headers, b"") as answer:
                    return answer.status, await answer.read_all()
        except EngineLost as error:
            self._why_down = str(error)
        except TimeoutError:
            self._why_down = f"{self.base_url}{path}: no answer within {self._probe_timeout_s:g} s"
        return None

    async def _read_models(self) -> None:
        """Check the key at ``/v1/models``, and read the models there if the server lists them."""
        self._models_due_s = time.monotonic() + MODELS_EVERY_S
        answer = await self._get("/v1/models")
        if answer is not None:
            self._check_key("/v1/models", answer[0])
            self._key_is_checked = True
            with contextlib.suppress(ValueError):
                self._set_models(read_cards(orjson.loads(answer[1])))
        if self.state.models is None:
            self._set_models([])

    def _set_models(self, listed: list[ModelCard]) -> None:
        """Set the models of the configuration, or else those that the server lists."""
        by_name = {card.id: card for card in listed}
        self.state.set_models([by_name.get(name, ModelCard(name)) for name in self._models] or listed)
        if listed:
            self._is_vllm = listed[0].owned_by == "vllm"
            self.takes_xargs = self._send_slo and listed[0].owned_by in XARGS_OWNERS
            self.state.max_model_len = listed[0].max_model_len or self.state.max_model_len

    def _set_alive(self, alive: bool, ready_in_s: float = PROBE_AGAIN_S[0]) -> None:
        if alive == self.state.alive:
            return
        self.state.alive = alive
        if not alive:
            self._reports.on_down()
        self.state.ready_in_s = 0.0 if alive else ready_in_s
        log.info("engine %s at %s is %s", self.name, self.base_url, "up" if alive else "down")
        self._events.on_alive(alive)
