"""The gateway as one ASGI app: `/v1/*` goes to the proxy, every other path to the operator's routes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.routing import Route

from engine_adapter.engine import ASGIApp, Engine, EngineEvents, Receive, Scope, Send
from gateway.api.auth import KeyRing
from gateway.api.connections import Connections, connections_for, descriptor_limit
from gateway.api.cors import Cors
from gateway.api.errors import ApiError
from gateway.api.operator_auth import UNGUARDED, check_operator
from gateway.api.operator_routes import operator_routes
from gateway.api.paths import API_PREFIX, unknown_path
from gateway.api.proxy import Proxy, ProxySettings
from gateway.api.reload_route import Reload, add_reload_route
from gateway.api.response_relay import send_error
from gateway.api.routes.table import RouteTable
from gateway.config.schema import RELOADABLE, ConfigChange, GatewayConfig
from gateway.engines import Engines, Expand, one_each
from gateway.observability.ledger import Entry, Ledger
from gateway.observability.live import HEADERS_ONLY_KEY, LiveFeed
from gateway.observability.metrics import Metrics
from gateway.observability.recording import make_recorder, make_recording
from gateway.observability.state_metrics import GatewayState
from gateway.observability.status import Status
from gateway.observability.wanted_replicas import WantedReplicas, WantedSettings
from gateway.observability.windows import MAX_TENANTS, Windows
from gateway.policies.base import Policy
from gateway.policies.registry import make_policy
from gateway.prediction.client import LengthPredictor
from gateway.prediction.lengths import LengthStatistics
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.retry_budget import RetryBudget
from gateway.scheduling.router import Router
from gateway.scheduling.routing import make_routing
from gateway.tenants.limits import TenantLimits

KEYS = frozenset(("keys", "keys_file", "server.operator_auth"))
"""Keys of the configuration that decide who may read the operator's pages."""


@dataclass(slots=True)
class Reloaded:
    """What a reload did.

    Attributes:
        changed: keys of the configuration that changed and count now.
        needs_restart: keys that changed and need a restart to take effect.
        starting: engines that were added and are not up yet.
        leaving: engines that finish their last requests.
    """

    changed: list[str] = field(default_factory=list)
    needs_restart: list[str] = field(default_factory=list)
    starting: list[str] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use the gateway: the keys of a configuration, and the limits of their tenants."""

    keys: KeyRing
    limits: dict[str, TenantLimits]

    @classmethod
    def of(cls, config: GatewayConfig) -> Access:
        """Return the access of ``config``. Takes 0.1 s with 10,000 keys."""
        ring = KeyRing(config.api_keys(), config.anonymous_key(), required=config.requires_key)
        return cls(ring, config.tenant_limits())


class Gateway:
    """One gateway and its engines, as an ASGI app. Call `start` before the first request and `stop` after the last.

    ``predictor_url``: the length predictor service; None predicts from the running ``statistics`` only.
    ``expand``: returns the engines of each section of the configuration, of which ``engines`` are the first ones.
    """

    def __init__(
        self,
        config: GatewayConfig,
        engines: list[Engine],
        predictor_url: str | None = None,
        statistics: LengthStatistics | None = None,
        expand: Expand = one_each,
    ) -> None:
        self._config = config
        self.can_reload = asyncio.Event()
        """Set unless `start` is under way."""
        self.can_reload.set()
        self._calibrations: set[asyncio.Task[None]] = set()
        # The engine queues share this dict. A reload changes it in place.
        self._queued_classes = classes = config.slo_classes()
        self.metrics = Metrics()
        # The router, the metrics and the status share this list. A reload changes it in place.
        self.engine_queues = [self._make_queue(engine) for engine in engines]
        self.recorder = make_recorder(
            config.decisions.keep, config.logging.access == "json", config.logging.access_path,
            config.tracing.enabled, config.tracing.endpoint, config.tracing.sample_ratio,
        )  # fmt: skip
        self._record_traffic()
        self.router = Router(self.engine_queues, make_routing(config.routing.name))
        self.engines = Engines(self.router, config.engines, self._make_queue, self.events_of, expand=expand)
        self.windows = Windows()
        self.ledger = Ledger(on_close=self._on_close, on_open=self.windows.on_open)
        self.status = Status(self.engine_queues, self.ledger, self.windows, self._state)
        self.live = LiveFeed(self.status)
        self.predictor = LengthPredictor(
            predictor_url,
            config.predictor.timeout_ms / 1000,
            statistics or LengthStatistics(expected=config.predictor.expected_tokens),
        )
        self.wanted_replicas = WantedReplicas(self.recorder.decisions, self.engine_queues, self._wanted_settings())
        self.metrics.registry.register(self.wanted_replicas)
        self.metrics.registry.register(
            GatewayState(self.engine_queues, lambda: self.engines.unjoined, self.ledger, self.windows)
        )
        self.metrics.predictor_up.set_function(lambda: float(self.predictor.up))
        self._retries = RetryBudget()
        limits = config.limits.limits()
        self.connections = Connections(
            limits,
            connections_for(descriptor_limit(), config.engine_connections()),
            self.metrics.on_connection_closed,
        )
        access = Access.of(config)
        self.proxy = Proxy(
            self.router,
            dict(classes),
            access.keys,
            self.predictor,
            self.ledger,
            self.metrics,
            self._retries,
            config.field_guard(),
            self.recorder,
            self._proxy_settings(),
        )
        self.metrics.watch_edge(self.connections, self.proxy.bodies)
        self._operator = operator_routes(self.why_not_ready, self.metrics, self.status, self.live, self.wanted_replicas)
        self.on_reload: Reload | None = None
        """Reads the configuration file again, for `POST /reload`. None without a file."""
        add_reload_route(self._operator, lambda: self.proxy.keys, self._reload_file)
        self._operator_paths = frozenset(route.path for route in self._operator.routes if isinstance(route, Route))
        self._api: ASGIApp = self._serve_api
        self._apply_limits()
        self._grant(access)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        # NOTE: the operator's routes may need no key, so pages of other origins must not read them.
        if scope["type"] == "http" and scope["path"] not in self._operator_paths:
            await self._api(scope, receive, send)
            return
        if self._config.operator_key_required and scope["path"] not in UNGUARDED:
            try:
                check_operator(Headers(scope=scope), self.proxy.keys)
            except ApiError as error:
                await send_error(send, error)
                return
        if scope.get("method") == "HEAD":
            # The server sends no body for HEAD.
            scope = {**scope, "method": "GET", HEADERS_ONLY_KEY: True}
        await self._operator(scope, receive, send)

    def _serve_api(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["path"].startswith(API_PREFIX):
            return self.proxy(scope, receive, send)
        return send_error(send, unknown_path(scope["path"]))

    async def start(self) -> None:
        """Start every engine and return when all can serve. Raises `engine_adapter.engine.EngineStartError`."""
        self.live.start()
        self.wanted_replicas.start()
        self.proxy.loading = True
        self.can_reload.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.predictor.warm_up())
            for engine_queue in self.engine_queues:
                group.create_task(engine_queue.engine.start(self.events_of(engine_queue)))
        self.proxy.loading = False
        self.can_reload.set()

    @property
    def config(self) -> GatewayConfig:
        """The configuration that counts now."""
        return self._config

    @property
    def open_requests(self) -> int:
        """Accepted requests that have not ended, scheduled or not."""
        return self.ledger.open_count + sum(queue.calls for queue in self.engines.queues)

    def why_not_ready(self) -> str:
        """Return why the gateway serves no requests now, with each engine's reason; "" if it does."""
        if self.proxy.draining:
            return "draining"
        return "" if self.router.alive else self.router.why_down()

    def events_of(self, engine_queue: EngineQueue) -> EngineEvents:
        """Return what the engine of ``engine_queue`` reports to."""

        def on_alive(alive: bool) -> None:
            engine_queue.on_alive(alive)
            if alive:
                self.router.offer(engine_queue)
                task = asyncio.create_task(
                    self.proxy.sizer.calibrate(engine_queue.engine), name="calibrate prompt sizes"
                )
                self._calibrations.add(task)
                task.add_done_callback(self._calibrations.discard)

        return EngineEvents(engine_queue.wake, on_alive, engine_queue.on_prefix_cache, engine_queue.on_limits)

    def reload(self, config: GatewayConfig) -> Reloaded:
        """Apply the keys of ``config`` that can change while the gateway serves (`RELOADABLE`).

        Open requests keep the class and the rights that they were judged with. Nothing changes if this raises
        pydantic's ValidationError, `gateway.engines.EngineConfigError` or
        `gateway.observability.recorder.ObservabilityError`.
        """
        return self.apply(self._config.change_to(config))

    def apply(self, change: ConfigChange, access: Access | None = None) -> Reloaded:
        """Apply a change of the current configuration, as `reload` does. ``access``: that of its configuration."""
        effective, changed = change.config, change.keys
        new_engines = self.engines.build_new(effective.engines) if "engines" in changed else {}
        if "recording" in changed:
            self._record_traffic(effective)
        old, self._config = self._config, effective
        if not self.proxy.in_flight:
            self._queued_classes.clear()
        # A removed class stays in the queues while requests are open, because they may belong to it.
        self._queued_classes.update(effective.slo_classes())
        self.proxy.classes = effective.slo_classes()
        self._grant(access or Access.of(effective))
        if effective.operator_key_required and not KEYS.isdisjoint(changed):
            self.live.readmit()
        self.proxy.guard = effective.field_guard()
        self._apply_limits()
        for engine_queue in self.engines.queues:
            engine_queue.circuit.max_rest_s = effective.failover.max_rest_s
            if "policy" in changed:
                engine_queue.set_policy(self._make_policy())
            if "shadow" in changed:
                engine_queue.set_shadows(effective.shadow_policies(), effective.changed_shadows(old))
        if "routing" in changed:
            self.router.routing = make_routing(effective.routing.name)
        self.wanted_replicas.settings = self._wanted_settings()
        if "engines" in changed:
            self.engines.change(effective.engines, new_engines)
        return Reloaded(
            [key for key in changed if key in RELOADABLE],
            [key for key in changed if key not in RELOADABLE],
            self.engines.starting,
            self.engines.leaving,
        )

    def update_engines(self) -> None:
        """Adapt the engines to what the sections of the configuration stand for now (``expand``)."""
        if self.can_reload.is_set():
            self.engines.change(self._config.engines, self.engines.build_new(self._config.engines))

    def _record_traffic(self, config: GatewayConfig | None = None) -> None:
        """Begin and end to record traffic as ``config`` asks, by default the current one."""
        recording = (config or self._config).recording
        old, self.recorder.traffic = self.recorder.traffic, make_recording(recording.path, recording.max_mb)
        sinks = self.recorder.sinks
        self.metrics.dropped_records.sinks = sinks if self.recorder.traffic is None else (*sinks, self.recorder.traffic)
        if old is not None:
            # Its last lines may wait for a disk.
            threading.Thread(target=old.close, name="close recording").start()

    def _grant(self, access: Access) -> None:
        """Have later requests judged by ``access``."""
        self.proxy.keys = access.keys
        self.proxy.accounts.tenants.set_limits(access.limits)

    async def _reload_file(self) -> dict[str, Any]:
        if self.on_reload is None:
            mistake = {"line": 1, "key": "", "reason": "the gateway was not started with a configuration file"}
            return {"ok": False, "file": "", "mistakes": [mistake]}
        return await self.on_reload()

    def _apply_limits(self) -> None:
        """Apply the limits of the configuration. Requests that are open keep theirs."""
        server, failover = self._config.server, self._config.failover
        self.connections.set_limits(self._config.limits.limits())
        self.proxy.set_settings(self._proxy_settings())
        self._retries.ratio, self._retries.per_second = failover.retry_ratio, failover.min_retries_per_s
        self.predictor.timeout_s = self._config.predictor.timeout_ms / 1000
        self.engines.drain_s = server.drain_s
        cors = server.cors
        self._api = self._serve_api
        if cors is not None:
            self._api = Cors(self._serve_api, cors.allow_origins, cors.allow_headers, cors.max_age_s)

    def _proxy_settings(self) -> ProxySettings:
        server = self._config.server
        return ProxySettings(
            server.max_body_bytes,
            server.max_open_requests,
            server.max_pass_through,
            self._config.failover.first_token_timeout_s,
            server.sse_keep_alive_s,
            RouteTable(server.pass_through_routes),
            self._config.limits.limits(),
        )

    def _wanted_settings(self) -> WantedSettings:
        config = self._config
        wanted = config.wanted_replicas
        return WantedSettings(
            wanted.enabled, wanted.target, wanted.window_s, wanted.interval_s, wanted.max_replicas,
            config.policy.name, dict(config.policy.options), config.routing.name,
        )  # fmt: skip

    def _make_policy(self) -> Policy:
        return make_policy(self._config.policy.name, dict(self._config.policy.options))

    def _make_queue(self, engine: Engine) -> EngineQueue:
        engine_queue = EngineQueue(
            engine,
            self._make_policy(),
            self._queued_classes,
            on_decided=self.metrics.scheduling.observer((engine.name,)),
            shadow=self._config.shadow_policies(),
        )
        engine_queue.circuit.max_rest_s = self._config.failover.max_rest_s
        return engine_queue

    async def drain(self, timeout_s: float) -> bool:
        """Reject new requests and wait for the open ones. Returns False if some are still open after ``timeout_s``."""
        self.proxy.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.proxy.in_flight:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stop the engines, the engine queues and the predictor client. Idempotent.

        Requests that are still open get 503 ``draining``, or an error event if their response has begun.
        """
        self.proxy.draining = self.proxy.stopping = True
        for task in self._calibrations:
            task.cancel()
        self.router.close()
        await self.live.stop()
        await self.wanted_replicas.stop()
        await self.predictor.close()
        await self.engines.stop()
        await self.proxy.cut()
        await asyncio.to_thread(self.recorder.close)

    def _state(self) -> dict[str, Any]:
        """Return what `/status` says beyond queues, engines and ledger."""
        predictor = "off" if self.predictor.url is None else "up" if self.predictor.up else "down"
        return {
            "policy": self._config.policy.name,
            "draining": self.proxy.draining,
            "shard": self._config.shard.document(),
            "starting": [{"name": q.engine.name, "why": q.engine.state.why_down} for q in self.engines.unjoined],
            "predictor": predictor,
            "predictor_up": self.predictor.up,
            "usage": self.proxy.accounts.document(MAX_TENANTS),
        }

    def _on_close(self, entry: Entry) -> None:
        self.metrics.on_close(entry)
        self.proxy.accounts.on_close(entry)
        self.status.on_close(entry)
