"""`antares serve`: start the predictor process, the engines and the gateway, and stop them in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn
from rich.console import Console
from rich.markup import escape

from engine_adapter.asgi import cancel_and_wait
from engine_adapter.engine import Engine, EngineStartError
from gateway import sd_notify
from gateway.api.connections import Connections, raise_descriptor_limit
from gateway.api.http_protocol import HttpProtocol
from gateway.app import Gateway
from gateway.child import Child
from gateway.config.engines import EngineConfig
from gateway.config.schema import GatewayConfig
from gateway.discovery import Discovery
from gateway.engines import build_engine
from gateway.heap import collecting_when_quiet
from gateway.listening import ServeError, listen, url
from gateway.observability.recorder import ObservabilityError
from gateway.predictor_process import supervised_predictor
from gateway.reload import Reloader, Report
from gateway.scheduling.shards import Shard
from gateway.supervisor import Supervisor

log = logging.getLogger("antares.serve")
console = Console(stderr=True, highlight=False)

EXIT_CUT = 3
"""Exit code if requests were still open when the drain ended. 1 and 2 are failed starts."""

NOT_READY_EVERY_S = 0.25
"""Seconds between checks whether an engine is up, until one is."""

CLOSE_S = 3.0
"""Seconds that clients have to read the end of their responses when the server stops. Convention."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, because SIGTERM must drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    config: GatewayConfig,
    load: Callable[[], GatewayConfig] | None = None,
    file: Path | None = None,
    child: Child | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM, then drain and stop. Returns the exit code: 0, or `EXIT_CUT` if requests were cut.

    ``load`` reads the configuration ``file`` again on SIGHUP. It raises `gateway.config.mistakes.ConfigError`.
    ``child``: which of several processes this is. Raises `ServeError` if the start fails.
    """
    cut = 0
    started = time.monotonic()
    if load is not None:
        _ignore_signals()
    for caution in [] if child is not None and child.index else config.cautions():
        log.warning("%s", caution)
    raise_descriptor_limit()
    async with contextlib.AsyncExitStack() as stack:
        listeners = _listeners(config, child)
        port: int = listeners[0].getsockname()[1]
        for listener in listeners:
            stack.callback(listener.close)
        if child is not None:
            stack.push_async_callback(cancel_and_wait, asyncio.create_task(child.end_with_parent(), name="parent"))
        supervisor, predictor_url = supervised_predictor(config, stack)
        if supervisor is not None:
            await supervisor.start()
            stack.push_async_callback(supervisor.stop)
        stack.push_async_callback(cancel_and_wait, asyncio.create_task(sd_notify.keep_watchdog(), name="watchdog"))
        discovery = Discovery(shard=_shard(config))
        gateway = await _gateway(config, predictor_url, discovery)
        _count_restarts(gateway.metrics.predictor_restarts.inc, supervisor, child)
        server = _Server(
            uvicorn.Config(
                gateway,
                http=partial(HttpProtocol, gateway.connections),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                access_log=False,
                # NOTE: `check_local` needs the address that a proxy on this machine forwards, although each request of
                # the API passes one coroutine more for it.
                proxy_headers=True,
                log_level="warning",
                server_header=False,
                backlog=2048,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=listeners), name="http server")
        stack.push_async_callback(_close, server, serving, gateway.connections)
        stack.push_async_callback(gateway.stop)
        stop, hurry = _stop_on_signals(child)
        if load is not None:
            stack.push_async_callback(_reload_on_signal(gateway, load, file, child))
        following = discovery.follow(lambda: gateway.config.engines, gateway.update_engines)
        stack.push_async_callback(cancel_and_wait, asyncio.create_task(following, name="discover engines"))
        starting = asyncio.create_task(_start(config, gateway), name="start engines")
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await stack.enter_async_context(collecting_when_quiet(lambda: gateway.open_requests))
            announcing = asyncio.create_task(_announce(gateway, port, started), name="announce")
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            await cancel_and_wait(announcing)
            sd_notify.notify(STOPPING=1, STATUS="draining")
            log.info("draining: %d open requests", gateway.open_requests)
            cut = await _drain(gateway, gateway.config.server.drain_s, hurry)
        else:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
        stopping.cancel()
    log.info("stopped")
    return EXIT_CUT if cut else 0


def _ignore_signals() -> None:
    # Until the gateway can reload.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Tools that rotate logs send it, and its default action ends the process. The access log needs no signal.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _listeners(config: GatewayConfig, child: Child | None) -> list[socket.socket]:
    """Return the sockets to serve: one, and for one of several processes the shared one and its own."""
    if child is None:
        return [listen(config.server.host, config.server.port)]
    own = listen(config.server.host, child.own_port)
    sd_notify.notify(X_OWN_PORT=own.getsockname()[1])
    return [listen(config.server.host, child.port, shared=True), own]


def _shard(config: GatewayConfig) -> Shard:
    """Return the gateway's share of the engines. Raises `ServeError`."""
    try:
        return config.shard.shard()
    except ValueError as error:
        raise ServeError(str(error)) from error


async def _gateway(config: GatewayConfig, predictor_url: str | None, discovery: Discovery) -> Gateway:
    """Return the gateway, with the engines that ``discovery`` finds now. Raises `ServeError`."""
    await discovery.refresh(config.engines)
    engines = [_build(engine) for of_section in discovery.engines(config.engines) for engine in of_section]
    try:
        return Gateway(config, engines, predictor_url, expand=discovery.engines)
    except ObservabilityError as error:
        raise ServeError(str(error)) from error


def _build(config: EngineConfig) -> Engine:
    try:
        return build_engine(config)
    except (EngineStartError, ValueError) as error:
        raise ServeError(f"engine {config.name}: {error}") from error


def _count_restarts(count: Callable[[], None], supervisor: Supervisor | None, child: Child | None) -> None:
    """Have ``count`` called for each restart of the predictor: this process's own, or the one that several share."""
    if supervisor is not None:
        supervisor.on_restart = count
    if child is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, count)


async def _start(config: GatewayConfig, gateway: Gateway) -> None:
    names = ", ".join(queue.engine.name for queue in gateway.engine_queues)
    slow = " (vLLM takes 30 to 90 s)" if any(engine.kind == "vllm" for engine in config.engines) else ""
    failed: BaseExceptionGroup[EngineStartError] | None = None
    try:
        with console.status(f"Starting engine {names}{slow}…"):
            await gateway.start()
    except* EngineStartError as group:
        # NOTE: what is raised here would be wrapped in another group.
        failed = group
    if failed is not None:
        raise ServeError("; ".join(str(error) for error in failed.exceptions)) from failed


async def _close(server: uvicorn.Server, serving: asyncio.Task[None], connections: Connections) -> None:
    """Stop the server. Clients have `CLOSE_S` seconds to read the rest of their responses."""
    server.should_exit = True
    await asyncio.wait({serving}, timeout=CLOSE_S)
    connections.cut_all()
    await asyncio.wait({serving}, timeout=CLOSE_S)
    server.force_exit = True
    await serving


async def _drain(gateway: Gateway, drain_s: float, hurry: asyncio.Event) -> int:
    """Wait for the open requests, at most ``drain_s`` seconds and until ``hurry`` is set. Return how many are left."""
    draining = asyncio.create_task(gateway.drain(drain_s))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurried):
        task.cancel()
    left = gateway.open_requests
    if left:
        log.warning("%d requests are still open and are answered with 503 draining", left)
    return left


def _stop_on_signals(child: Child | None) -> tuple[asyncio.Event, asyncio.Event]:
    """Return two events: the first SIGINT or SIGTERM sets the first one, the second signal sets both.

    From the third signal on, everything but the HTTP server is cancelled. ``child``: only SIGINT counts twice.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if hurry.is_set():
            log.warning("third signal: cancelling what is left")
            for task in asyncio.all_tasks(loop):
                if task.get_name() != "http server":
                    task.cancel()
        elif stop.is_set():
            log.warning("second signal: not waiting for open requests")
            hurry.set()
        stop.set()

    loop.add_signal_handler(signal.SIGINT, on_signal)
    # A process manager may send SIGTERM to all processes, and then the parent forwards its own.
    loop.add_signal_handler(signal.SIGTERM, on_signal if child is None else stop.set)
    return stop, hurry


def _reload_on_signal(
    gateway: Gateway, load: Callable[[], GatewayConfig], file: Path | None, child: Child | None
) -> Callable[[], Awaitable[None]]:
    """Reload the configuration on SIGHUP and on `POST /reload`, and return a function that ends that."""

    def on_end(report: Report) -> None:
        failed = f"; the last reload failed: {report.mistakes[0]}" if report.mistakes else ""
        sd_notify.notify(READY=1, STATUS=_status(gateway) + failed)

    reloader = Reloader(gateway, load, file=file, on_begin=sd_notify.reloading, on_end=on_end)
    gateway.on_reload = reloader.reload if child is None else child.reloading_all(reloader.reload)
    reloader.watch_keys()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.request)
    return reloader.stop


def _status(gateway: Gateway) -> str:
    """Return whether the gateway can serve, in one line."""
    why = gateway.why_not_ready()
    return f"not ready: {why}" if why else "ready"


async def _announce(gateway: Gateway, port: int, started: float) -> None:
    """Print that the gateway is ready, once it is. Before that, print why it is not, again for every other reason."""
    # For systemd the service has started: it listens, answers /health and keeps trying.
    sd_notify.notify(READY=1, STATUS=_status(gateway))
    printed = ""
    while why := gateway.why_not_ready():
        if why != printed:
            printed = why
            console.print(
                f"[bold yellow]Antares is not ready[/bold yellow]: {escape(why)}. It keeps trying.", soft_wrap=True
            )
            sd_notify.notify(STATUS=_status(gateway))
        await asyncio.sleep(NOT_READY_EVERY_S)
    if printed:
        sd_notify.notify(STATUS=_status(gateway))
    _print_ready(gateway, port, time.monotonic() - started)


def _print_ready(gateway: Gateway, port: int, seconds: float) -> None:
    config = gateway.config
    for engine_queue in gateway.engine_queues:
        engine = engine_queue.engine
        if not engine.state.alive:
            console.print(
                f"engine {engine.name} is not up: {escape(engine.state.why_down)}. Antares keeps trying.",
                soft_wrap=True,
            )
    base = url(config.server.host, port)
    model = gateway.router.default_model or "MODEL"
    up = ", ".join(queue.engine.name for queue in gateway.engine_queues if queue.engine.state.alive)
    auth = ' -H "Authorization: Bearer $ANTARES_API_KEY"' if config.requires_key else ""
    console.print(
        f"""
[bold green]Antares is ready[/bold green] at {base} after {seconds:.0f} s, policy {config.policy.name}, engines {up}. Ctrl-C stops it.

  curl {base}/v1/chat/completions{auth} -H 'content-type: application/json' \\
    -H 'x-slo-ttft-ms: 2000' -H 'x-slo-tpot-ms: 200' -H 'x-slo-report: 1' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}], "max_tokens": 32, "temperature": 0}}'

  from openai import OpenAI
  client = OpenAI(base_url="{base}/v1", api_key="{"..." if config.requires_key else "none"}")
  stream = client.chat.completions.create(
      model="{model}", messages=[{{"role": "user", "content": "Tell me a story."}}], stream=True, max_tokens=64,
      extra_headers={{"x-slo-ttft-ms": "2000", "x-slo-tpot-ms": "200"}})
  for chunk in stream: print(chunk.choices[0].delta.content or "", end="", flush=True)

  dashboard {base}/dashboard   metrics {base}/metrics   API {base}/docs
""",  # noqa: E501 - a command to copy
        markup=True,
        soft_wrap=True,
    )
