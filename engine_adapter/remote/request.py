"""What goes upstream: the client's request without its secrets, and completions as countable streams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from engine_adapter.asgi import encode_json
from engine_adapter.engine import GATE_XARG, TPOT_XARG
from engine_adapter.remote.assemble import can_rebuild

Headers = list[tuple[bytes, bytes]]

COMPLETION_PATHS = ("/chat/completions", "/completions")
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
# The gateway's own credentials, in every place where a client may put them.
_SECRETS = frozenset((b"authorization", b"proxy-authorization", b"x-api-key", b"api-key", b"cookie"))
# Set afresh: the host and length of what is sent, and no compression, for the bytes are read on the way.
_REPLACED = frozenset((b"host", b"content-length", b"accept-encoding", b"expect"))
_SLO_PREFIXES = (b"x-slo-", b"x-llm-d-slo-")


def upstream_headers(headers: Iterable[tuple[bytes, bytes]], api_key: str | None, send_slo: bool) -> Headers:
    """Request headers to send: no hop-by-hop header, no gateway credential, the engine's own key if any."""
    sent: Headers = []
    received = [(raw.lower(), value) for raw, value in headers]
    dropped = _HOP_BY_HOP | _SECRETS | _REPLACED | _nominated(received)
    for name, value in received:
        if name in dropped:
            continue
        if not send_slo and name.startswith(_SLO_PREFIXES):
            continue
        sent.append((name, value))
    sent.append((b"accept-encoding", b"identity"))
    if api_key is not None:
        sent.append((b"authorization", b"Bearer " + api_key.encode()))
    return sent


def downstream_headers(headers: Iterable[tuple[bytes, bytes]], altered: bool) -> Headers:
    """Response headers to pass on; ``altered`` drops those that describe the body's exact bytes."""
    about_bytes = (b"content-length", b"content-encoding", b"content-md5", b"etag")
    received = [(raw.lower(), value) for raw, value in headers]
    dropped = _HOP_BY_HOP | _nominated(received) | (frozenset(about_bytes) if altered else frozenset())
    return [(name, value) for name, value in received if name not in dropped]


def _nominated(headers: Headers) -> frozenset[bytes]:
    """The further hop-by-hop headers that a ``Connection`` header names."""
    names = b",".join(value for name, value in headers if name == b"connection")
    return frozenset(name.strip().lower() for name in names.split(b","))


@dataclass(slots=True)
class CompletionPlan:
    """How one completion request is put to the upstream.

    ``rewritten``: the client wants one JSON body, the upstream is asked for a stream. ``asked_usage``: the
    usage chunk was asked for by us, so the client must not see it. ``sequences``: how many will be generated.
    """

    body: dict[str, Any]
    streams: bool
    rewritten: bool
    asked_usage: bool
    sequences: int

    @classmethod
    def make(cls, document: dict[str, Any], rewrite: bool, ask_usage: bool, send_slo: bool) -> CompletionPlan:
        """Return the plan for the request body ``document``, which stays unchanged.

        ``rewrite``: ask for streams in place of plain bodies, where the answer can be rebuilt. ``ask_usage``:
        the upstream understands ``stream_options``.
        """
        body = dict(document)
        streams = body.get("stream") is True
        rewritten = rewrite and not body.get("stream") and can_rebuild(body)
        options = body.get("stream_options") or {}
        asks = isinstance(options, dict) and not options.get("include_usage")
        plan = cls(
            body=body,
            streams=streams or rewritten,
            rewritten=rewritten,
            asked_usage=ask_usage and (streams or rewritten) and asks,
            sequences=_sequences(body),
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
        """The TPOT bound by which the request sits steps out; None if it decodes in every step."""
        xargs = self.body.get("vllm_xargs")
        skips = isinstance(xargs, dict) and xargs.get(GATE_XARG, "credit") == "credit"
        bound = xargs.get(TPOT_XARG) if skips and isinstance(xargs, dict) else None
        return float(bound) if isinstance(bound, int | float) and bound > 0 else None

    def without_usage(self) -> None:
        """Take back the question for the usage chunk."""
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


def _sequences(body: dict[str, Any]) -> int:
    n = body.get("n")
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return prompts * (n if isinstance(n, int) and n > 0 else 1)


def _drop_slo(body: dict[str, Any]) -> None:
    """Remove what only our own step gate reads; another server might refuse the field."""
    xargs = body.get("vllm_xargs")
    if not isinstance(xargs, dict):
        return
    kept = {key: value for key, value in xargs.items() if not key.startswith("antares_")}
    if kept:
        body["vllm_xargs"] = kept
    else:
        del body["vllm_xargs"]
