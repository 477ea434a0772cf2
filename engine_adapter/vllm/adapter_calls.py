"""Calls to vLLM that load or unload LoRA adapters. Each one continues if its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from engine_adapter.engine import EngineLost


class AdapterCalls:
    """The calls that are under way.

    The EngineCore computes no step while it loads an adapter, and does not stop loading when the client leaves. So the
    watchdog must know of a load until it ends.

    ``on_end``: awaited after each call that ends without an exception.
    """

    def __init__(self, on_end: Callable[[], Awaitable[None]]) -> None:
        self._on_end = on_end
        self._calls: set[asyncio.Task[None]] = set()

    def __bool__(self) -> bool:
        return bool(self._calls)

    async def run(self, call: Coroutine[Any, Any, None]) -> None:
        """Await ``call``, which continues if the caller is cancelled. Raises `EngineLost` after `cancel`."""
        task = asyncio.create_task(self._run(call))
        self._calls.add(task)
        task.add_done_callback(self._on_done)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise EngineLost("the engine died") from None
            raise

    def cancel(self) -> None:
        """Cancel every call. NOTE: vLLM ends no call into an EngineCore that died."""
        for call in list(self._calls):
            call.cancel()

    async def _run(self, call: Coroutine[Any, Any, None]) -> None:
        await call
        await self._on_end()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # the caller may be gone, and asyncio logs exceptions that nothing retrieves
