"""Builds upstream requests: filters headers, and turns completions into streams whose tokens can be counted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson

from engine_adapter.asgi import encode_json
from engine_adapter.engine import GATE_XARG, TPOT_XARG, Scope
from engine_adapter.remote.assemble import can_rebuild
from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.token_counter import TokenCounter

Headers = list[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# Headers that may hold the client's credentials for the gateway.
_CREDENTIALS = frozenset((b"authorization", b"proxy-authorization", b"x-api-key", b"api-key", b"cookie"))
# Set by this proxy. Compression is disabled because the proxy reads the response bytes.
_REPLACED = frozenset((b"host", b"content-length", b"accept-encoding", b"expect"))
_SLO_PREFIXES = (b"x-slo-", b"x-llm-d-slo-")
# The gateway's own server sets them, so the client would get two.
_SERVERS_OWN = frozenset((b"date", b"server"))
_BODY_HEADERS = frozenset((b"content-length", b"content-encoding", b"content-md5", b"etag"))

_STREAM = re.compile(rb"\bstream", re.IGNORECASE)

_NOT_SENT = _HOP_BY_HOP | _CREDENTIALS | _REPLACED
_NOT_RETURNED = _HOP_BY_HOP | _SERVERS_OWN
_NOT_RETURNED_IF_ALTERED = _NOT_RETURNED | _BODY_HEADERS


def upstream_headers(headers: Headers, api_key: str | None, send_slo: bool) -> Headers:
    """Headers of the upstream request: without hop-by-hop headers and gateway credentials, with the engine's key.

    ``headers``: those of the client's request, with names in lower case, as ASGI requires.
    """
    dropped = _with_connection_options(_NOT_SENT, headers)
    forwarded = [header for header in headers if header[0] not in dropped]
    if not send_slo:
        forwarded = [header for header in forwarded if not header[0].startswith(_SLO_PREFIXES)]
    forwarded.append((b"accept-encoding", b"identity"))
    if api_key is not None:
        forwarded.append((b"authorization", b"Bearer " + api_key.encode()))
    return forwarded


def downstream_headers(headers: Headers, altered: bool) -> Headers:
    """Response headers for the client, without those that the gateway's server sets itself.

    ``headers``: those of the `Response`. ``altered``: the proxy changes the body, so headers that describe its exact
    bytes are dropped.
    """
    dropped = _with_connection_options(_NOT_RETURNED_IF_ALTERED if altered else _NOT_RETURNED, headers)
    return [header for header in headers if header[0] not in dropped]


def _with_connection_options(dropped: frozenset[bytes], headers: Headers) -> frozenset[bytes]:
    """Return ``dropped`` and the additional hop-by-hop headers that the ``Connection`` header names."""
    if b"connection" not in dict(headers):
        return dropped
    values = [value for name, value in headers if name == b"connection"]
    return dropped | {name.strip().lower() for name in b",".join(values).split(b",")}


@dataclass(slots=True)
class CompletionPlan:
    """How to send one request that generates tokens upstream, and how to count them.

    Attributes:
        counter: counts the tokens of the response; chosen by the route.
        body: the parsed request body to send.
        streams: the upstream response is an event stream.
        rewritten: the client wants one JSON body, but the upstream request asks for a stream.
        asked_usage: the proxy added ``include_usage``, so the client must not see the usage chunk.
        sequences: number of sequences that the request generates.
        usage_was_rejected: the server rejected ``include_usage``.
    """

    counter: type[TokenCounter]
    body: dict[str, Any]
    streams: bool
    rewritten: bool
    asked_usage: bool
    sequences: int
    usage_was_rejected: bool = False

    @classmethod
    def make(
        cls,
        document: dict[str, Any],
        rewrite: bool,
        ask_usage: bool,
        send_slo: bool,
        counter: type[TokenCounter] = CompletionCounter,
    ) -> CompletionPlan:
        """Return the plan for a request body. Only a completion is ever rewritten or asked for usage.

        Args:
            document: the client's request body, which stays unchanged.
            rewrite: request a stream instead of a JSON body where the response can be rebuilt from the stream.
            ask_usage: the upstream supports ``stream_options``.
            send_slo: keep the ``antares_*`` members of ``vllm_xargs``.
            counter: counts the tokens of the response; see `counting.counter_for`.
        """
        body = dict(document)
        streams = body.get("stream") is True
        is_completion = counter is CompletionCounter
        rewritten = is_completion and rewrite and not body.get("stream") and can_rebuild(body)
        options = body.get("stream_options") or {}
        can_add_usage = is_completion and isinstance(options, dict) and not options.get("include_usage")
        plan = cls(
            counter=counter,
            body=body,
            streams=streams or rewritten,
            rewritten=rewritten,
            asked_usage=ask_usage and (streams or rewritten) and can_add_usage,
            sequences=_sequence_count(body) if issubclass(counter, CompletionCounter) else 1,
        )
        if rewritten:
            body["stream"] = True
        if plan.asked_usage:
            body["stream_options"] = {**options, "include_usage": True}
        if not send_slo:
            _drop_slo(body)
        return plan

    @property
    def tpot_ms(self) -> float | None:
        """The pace (ms per token) by which the ``credit`` gate makes the request skip steps. None if it skips none."""
        xargs = self.body.get("vllm_xargs")
        skips_steps = isinstance(xargs, dict) and xargs.get(GATE_XARG, "credit") == "credit"
        bound = xargs.get(TPOT_XARG) if skips_steps and isinstance(xargs, dict) else None
        return float(bound) if isinstance(bound, int | float) and bound > 0 else None

    @property
    def may_pause(self) -> bool:
        """Whether the response may have a tool call, whose tokens some servers hold back until it is complete."""
        return bool(self.body.get("tools") or self.body.get("functions"))

    @property
    def is_altered(self) -> bool:
        """Whether the upstream request asks for what the client's does not: a stream, or its usage."""
        return self.rewritten or self.asked_usage

    def gives_up(self, status: int, error: bytes) -> bool:
        """Ask no longer for what the client did not ask for and the server's ``error`` names. False without such."""
        if self.asked_usage and (b"stream_options" in error or b"include_usage" in error):
            self._drop_usage()
            self.usage_was_rejected = True
        # Some servers raise an exception that nothing handles. Other failures inside a server may name streams too.
        elif self.rewritten and _STREAM.search(error) and (status != 500 or b"support" in error):
            self._drop_usage()
            self.body.pop("stream", None)
            self.streams = self.rewritten = False
        else:
            return False
        return True

    def _drop_usage(self) -> None:
        self.asked_usage = False
        options = self.body.pop("stream_options", None) or {}
        options.pop("include_usage", None)
        if options:
            self.body["stream_options"] = options

    def encoded(self) -> bytes:
        """Return the body to send. Raises `BodyTooDeep`."""
        return encode_json(self.body)


def parse_completion(raw: bytes) -> dict[str, Any] | None:
    """Return the JSON object in ``raw``; None if it is not one, in which case the upstream rejects the request."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def _sequence_count(body: dict[str, Any]) -> int:
    n = body.get("n")
    messages, prompt = body.get("messages"), body.get("prompt")
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        prompt = messages  # a batch of chats
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return prompts * (int(n) if isinstance(n, int | float) and n >= 1 else 1)


def _drop_slo(body: dict[str, Any]) -> None:
    """Remove the ``antares_*`` members of ``vllm_xargs``.

    Only our step gate reads them. Other servers may reject unknown fields.
    """
    xargs = body.get("vllm_xargs")
    if not isinstance(xargs, dict):
        return
    kept = {key: value for key, value in xargs.items() if not key.startswith("antares_")}
    if kept:
        body["vllm_xargs"] = kept
    else:
        del body["vllm_xargs"]


def target(scope: Scope) -> bytes:
    """Return the request's raw path and query, without the prefix under which the gateway is mounted."""
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    query: bytes = scope["query_string"]
    path = path.removeprefix(scope.get("root_path", "").encode())
    return path + b"?" + query if query else path
