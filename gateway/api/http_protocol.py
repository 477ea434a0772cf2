"""uvicorn's HTTP protocol, for clients that offer an upgrade to HTTP/2."""

from __future__ import annotations

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)


class HttpProtocol(HttpToolsProtocol):
    """Answers such a request over HTTP/1.1, as RFC 9110 allows.

    Java's HTTP client offers ``Upgrade: h2c`` by default. NOTE: httptools skips the body of every request with an
    upgrade, so the offer is removed before it sees the head. An offer that arrives in a later packet than the
    beginning of its request stays.
    """

    def data_received(self, data: bytes) -> None:
        """Receive bytes from the client."""
        if self.cycle is None or self.cycle.response_complete:
            head, blank, rest = data.partition(b"\r\n\r\n")
            data = _OFFER.sub(b"", head + b"\r\n", count=1)[:-2] + blank + rest if blank else data
        super().data_received(data)
