"""vLLM's OpenAI app around an AsyncLLM, and one call to it that ends with `EngineLost` if the engine dies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine_adapter.engine import (
    OBSERVER_KEY,
    RENDERING_KEY,
    XARGS_KEY,
    ASGIApp,
    EngineLost,
    Message,
    Receive,
    Scope,
    Send,
)
from engine_adapter.vllm.rendering import current_rendering
from engine_adapter.vllm.token_observation import current_observer, current_xargs


async def build(llm: Any, args: Any) -> Any:
    """Return vLLM's OpenAI app for ``llm``, an AsyncLLM. ``args``: vLLM's parsed arguments."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    app.state.server = _NoServer()
    return app


async def call(app: ASGIApp, scope: Scope, receive: Receive, send: Send, is_dead: Callable[[], bool]) -> None:
    """Call vLLM's ``app``. Raises `EngineLost` if the engine died meanwhile, which ``is_dead`` says."""
    lost = False

    async def send_unless_dead(message: Message) -> None:
        nonlocal lost
        # For a dead engine, vLLM sends its own 500 or error event. Drop it and everything after it, because
        # the gateway must learn that the engine died, and sends a more precise error.
        if lost or (is_dead() and _is_error(message)):
            lost = True
            return
        await send(message)

    observer_token = current_observer.set(scope.get(OBSERVER_KEY))
    rendering_token = current_rendering.set(scope.get(RENDERING_KEY))
    xargs_token = current_xargs.set(scope.get(XARGS_KEY))
    try:
        await app(scope, receive, send_unless_dead)
    except Exception as error:
        if is_dead():
            raise EngineLost("the engine died") from error
        raise
    finally:
        current_observer.reset(observer_token)
        current_rendering.reset(rendering_token)
        current_xargs.reset(xargs_token)
    if lost:
        raise EngineLost("the engine died")


class _NoServer:
    """Replaces vLLM's uvicorn server, which vLLM stops when the engine dies. The gateway's server keeps running."""

    should_exit = False


def _is_error(message: Message) -> bool:
    if message["type"] == "http.response.start":
        return bool(message["status"] >= 500)
    return b'"error"' in message.get("body", b"")
