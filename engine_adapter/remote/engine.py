"""Any OpenAI-compatible server as an engine: a reverse proxy that sees the tokens go by."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Literal

import orjson
from yarl import URL

from engine_adapter.engine import ASGIApp, EngineEvents, EngineLost, EngineStartError, EngineState
from engine_adapter.remote.client import Upstream
from engine_adapter.remote.proxy import HttpProxy
from engine_adapter.step_time.curve import StepCurve
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel

log = logging.getLogger("antares.engine.http")

PROBE_EVERY_S = 2.0
"""Seconds between health probes while the server answers."""
PROBE_AGAIN_S = (0.25, 0.5, 1.0, 2.0, 5.0)
PROBE_AT_ONCE_S = 0.05
"""One that a connection did not come about to may be back as soon as it is asked: nobody is turned away before that."""
"""Seconds before each further probe of a server that does not answer; the last one repeats."""
XARGS_OWNERS = ("vllm", "antares")
"""``owned_by`` of servers that take ``vllm_xargs``; others may refuse a request for an unknown field."""

_ALONE = ((1, 0, 0), (0, 0, 512))
"""Steps (decodes, their context, prompt tokens) of an engine that has one request."""


class HttpEngine:
    """A remote OpenAI-compatible server.

    Requests and answers pass through as they are, except that

    * hop-by-hop headers, the client's credentials and, unless ``send_slo``, its SLO are not sent; * a
    streamed completion is asked for its usage, and the client sees that chunk only if it asked itself; * with
    ``first_token="stream"``, a plain completion is asked for as a stream and put together here, so that its
      first token is seen when it comes (`assemble.NOT_REBUILDABLE` lists the requests for which it is not).

    Args:
        name: the engine's name in metrics.
        base_url: where the server is; a trailing ``/v1`` is understood.
        api_key: the server's own key, sent as a bearer token.
        max_num_seqs, max_num_batched_tokens, max_model_len: the server's limits, which it does not tell (all
            but ``max_model_len``, which is taken from ``/v1/models`` where that has it).
        step_times: what is known about its step times; refined from the streams.
        connect_timeout_s, read_timeout_s: seconds until a connection, and until the next byte, is given up.
        max_connections: requests in flight at once; further ones wait for a connection. Health probes have their own.
        first_token: how the first token of a plain completion is seen.
        send_slo: whether the server may see ``x-slo-*`` headers and ``antares_*`` fields of ``vllm_xargs``.

    Raises:
        ValueError: ``base_url`` is no http or https URL.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        api_key: str | None = None,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int = 8192,
        step_times: StepTimes | None = None,
        connect_timeout_s: float = 5,
        read_timeout_s: float = 600,
        max_connections: int = 1024,
        first_token: Literal["stream", "none"] = "stream",
        send_slo: bool = True,
    ) -> None:
        self.name = name
        self.base_url = _base_url(base_url)
        self._first_guess = step_times or StepTimes()
        self.state = EngineState(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            step_time=StepTimeModel(times=self._first_guess),
        )
        self.takes_xargs = False
        self._api_key = api_key
        self._send_slo = send_slo
        self._connect_timeout_s = connect_timeout_s
        self._upstream = Upstream(name, self.base_url, max_connections, connect_timeout_s, read_timeout_s)
        # Its own: a probe that waited for one of the requests' connections would take a busy server for a dead one.
        self._for_probes = Upstream(name, self.base_url, 1, connect_timeout_s, read_timeout_s)
        self._probe_now = asyncio.Event()
        self._proxy = HttpProxy(
            upstream=self._upstream,
            state=self.state,
            api_key=api_key,
            see_first_token=first_token == "stream",
            send_slo=send_slo,
            on_unreachable=self._note_death,
            on_broken=self._note_break,
        )
        self._events = EngineEvents()
        self._health_path = "/health"
        self._watcher: asyncio.Task[None] | None = None

    @property
    def app(self) -> ASGIApp:
        """The reverse proxy."""
        return self._proxy

    async def start(self, events: EngineEvents) -> None:
        """Probe the server once, then keep watching it.

        A server that does not answer yet is no error: it is not ours to start, so ``state.alive`` stays False
        until it answers. Raises `EngineStartError` when it answers and refuses the key.
        """
        self._events = self._proxy.events = events
        await self._probe()
        if not self.state.alive:
            log.warning("engine %s: nothing answers at %s yet; waiting for it", self.name, self.base_url)
        self._watcher = asyncio.create_task(self._watch(), name=f"{self.name}-health")

    async def stop(self) -> None:
        """Stop watching and close all connections; requests in flight get `EngineLost`. Idempotent."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        self.state.alive = False
        await asyncio.gather(self._upstream.close(), self._for_probes.close())

    def count_tokens(self, text: str) -> int | None:
        """None: the tokenizer is at the other end."""
        return None

    async def probe(self) -> None:
        """A remote server gets no work that nobody asked for: go back to the first guess, and learn anew.

        Unless that is nowhere faster than what was learnt: more would be refused then, not less.
        """
        guess, learnt = StepCurve.of(self._first_guess), self.state.step_time.curve
        if any(guess.step_s(*step) < learnt.step_s(*step) for step in _ALONE):
            self.state.step_time.start_over(self._first_guess)

    def unsupported_reason(self, body: dict[str, Any]) -> str | None:
        """None: the server refuses for itself."""
        return None

    def _note_death(self) -> None:
        """No connection came about. Whoever comes must not try in vain: it waits, or goes to another engine.

        It may have been a moment only, so look again at once.
        """
        if self.state.alive:
            self._set_alive(False, back_in_s=PROBE_AT_ONCE_S)
            self._probe_now.set()

    def _note_break(self) -> None:
        """A connection broke, which need not be the server's end; of one that is gone it tells nothing new."""
        if self.state.alive:
            self._probe_now.set()

    async def _watch(self) -> None:
        failures = 0 if self.state.alive else 1
        while True:
            pause = PROBE_AGAIN_S[min(failures, len(PROBE_AGAIN_S)) - 1] if failures else PROBE_EVERY_S
            self.state.ready_in_s = pause if failures else 0.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._probe_now.wait(), pause)
                if self.state.alive:
                    # A connection broke. Many may break at once; one probe speaks for them all.
                    await asyncio.sleep(0.05)
            self._probe_now.clear()
            try:
                await self._probe()
            except EngineStartError as error:
                log.warning("engine %s: %s", self.name, error)
                self._set_alive(False)
            failures = 0 if self.state.alive else failures + 1

    async def _probe(self) -> None:
        """Ask for the server's health; learn what it serves when it has just come up."""
        status = await self._status(self._health_path)
        if status in (404, 405, 501) and self._health_path == "/health":
            # Not vLLM: every OpenAI-compatible server lists its models.
            self._health_path = "/v1/models"
            status = await self._status(self._health_path)
        if status in (401, 403):
            raise EngineStartError(
                f"{self.base_url} answers {status}: set this engine's api_key to the server's own key"
            )
        alive = status == 200
        if alive and not self.state.alive:
            await self._read_model_card()
        self._set_alive(alive)

    async def _status(self, path: str) -> int | None:
        try:
            return (await self._get(path))[0]
        except (EngineLost, TimeoutError):
            return None

    async def _get(self, path: str) -> tuple[int, bytes]:
        """Status and body, over a new connection: whether one comes about is half of what a probe asks."""
        headers = [(b"connection", b"close")]
        if self._api_key:
            headers.append((b"authorization", f"Bearer {self._api_key}".encode()))
        async with self._for_probes.answer("GET", path.encode(), headers, b"", self._connect_timeout_s) as response:
            return response.status, await response.read()

    async def _read_model_card(self) -> None:
        with contextlib.suppress(EngineLost, TimeoutError, ValueError, LookupError, TypeError, AttributeError):
            card = orjson.loads((await self._get("/v1/models"))[1])["data"][0]
            self.state.model = str(card["id"])
            self.takes_xargs = self._send_slo and card.get("owned_by") in XARGS_OWNERS
            limit = card.get("max_model_len")
            if isinstance(limit, int) and limit > 0:
                self.state.max_model_len = limit

    def _set_alive(self, alive: bool, back_in_s: float = PROBE_AGAIN_S[0]) -> None:
        if alive == self.state.alive:
            return
        self.state.alive = alive
        self.state.ready_in_s = 0.0 if alive else back_in_s
        log.info("engine %s at %s is %s", self.name, self.base_url, "up" if alive else "down")
        self._events.on_alive(alive)


def _base_url(text: str) -> str:
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url {text!r} is no http(s) URL: write it like http://host:8000")
    if url.user is not None or url.password is not None:
        # It would be in every log line and error that names the server.
        raise ValueError("base_url must not hold a user or a password: give the server's key as api_key")
    return text.rstrip("/").removesuffix("/v1")
