"""One HTTP transport made of several small connection pools.

httpcore looks at every connection of its pool, and counts the idle ones again for each idle one, whenever a request
starts or ends. At a hundred idle connections that is 2.5 ms of event loop, at a thousand a quarter of a second.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

SHARD_CONNECTIONS = 32


class ConnectionShards(httpx.AsyncBaseTransport):
    """Sends each request through the first pool with a free connection, so that few requests share few warm ones.

    ``connections``: how many in all, rounded up to whole pools of `SHARD_CONNECTIONS`; requests beyond them wait in
    the last pool. ``keepalive_s``: seconds that an idle connection is kept. ``verify``: check TLS certificates.
    """

    def __init__(self, connections: int, keepalive_s: float, verify: bool) -> None:
        limits = httpx.Limits(
            max_connections=SHARD_CONNECTIONS,
            max_keepalive_connections=SHARD_CONNECTIONS,
            keepalive_expiry=keepalive_s,
        )
        # The certificate store is loaded once: a transport would load its own.
        context = httpx.create_ssl_context(verify=verify, trust_env=False)
        shards = -(-connections // SHARD_CONNECTIONS)
        self._pools = [httpx.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits) for _ in range(shards)]
        self._held = [0] * shards

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request``; its connection is held until the response's stream is closed."""
        full = len(self._pools) - 1
        shard = next((i for i, held in enumerate(self._held) if held < SHARD_CONNECTIONS), full)
        self._held[shard] += 1
        try:
            response = await self._pools[shard].handle_async_request(request)
        except BaseException:
            self._held[shard] -= 1
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Held(response.stream, self._held, shard)
        return response

    async def aclose(self) -> None:
        """Close every connection; requests in flight break."""
        for pool in self._pools:
            await pool.aclose()


class _Held(httpx.AsyncByteStream):
    """A response's stream that gives its connection's place back when closed."""

    def __init__(self, stream: httpx.AsyncByteStream, held: list[int], shard: int) -> None:
        self._stream = stream
        self._held = held
        self._shard = shard
        self._open = True

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            self._held[self._shard] -= 1
        await self._stream.aclose()
