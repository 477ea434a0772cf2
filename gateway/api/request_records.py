"""The routes `GET /v1/requests` and `GET /v1/requests/{id}`: what was decided about the latest requests."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import parse_qs

import orjson

from engine_adapter.engine import Scope
from gateway.api.auth import ApiKey
from gateway.api.errors import bad_request, not_found
from gateway.api.http_request import HttpRequest
from gateway.observability.decisions import FILTERS, MAX_LISTED, Decisions

REQUESTS_PATH = "/v1/requests"
_DEFAULT_LISTED = 50
_LONGEST_QUERY = 1024


def asks_for_records(http: HttpRequest) -> bool:
    """Whether the request reads the records of requests."""
    path: str = http.scope["path"]
    return path == REQUESTS_PATH or path.startswith(REQUESTS_PATH + "/")


async def send_records(http: HttpRequest, decisions: Decisions, key: ApiKey) -> None:
    """Answer with the record that the path names, or with the latest ones.

    Raises `ApiError` 404 if there is no such request that ``key`` may see, or 400 for a malformed query.
    """
    tenant = None if _sees_all(key, http.scope) else key.tenant
    request_id = http.scope["path"][len(REQUESTS_PATH) + 1 :]
    if request_id:
        record = decisions.find(request_id, tenant)
        if record is None:
            raise not_found(f"No request {request_id[:128]} among the latest ones. GET {REQUESTS_PATH} lists them.")
        document = record.document()
    else:
        limit, outcome, asked_tenant = _query(http.scope)
        if tenant is not None and asked_tenant not in (None, tenant):
            records = []
        else:
            records = decisions.latest(limit, outcome, tenant if tenant is not None else asked_tenant)
        document = {"object": "list", "data": [record.document() for record in records]}
    body = orjson.dumps(document)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await http.send({"type": "http.response.start", "status": 200, "headers": headers})
    await http.send({"type": "http.response.body", "body": body})


def _sees_all(key: ApiKey, scope: Scope) -> bool:
    """Whether ``key`` may see the requests of every tenant: an operator's, or none at all on the loopback."""
    if getattr(key, "operator", False):
        return True
    client = scope.get("client")
    if key.sha256 or not client:
        return False
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _query(scope: Scope) -> tuple[int, str, str | None]:
    """Return limit, outcome ("" for any) and tenant (None for any). Raises `ApiError` 400."""
    raw: bytes = scope.get("query_string") or b""
    if len(raw) > _LONGEST_QUERY:
        raise bad_request(f"The query is longer than {_LONGEST_QUERY} bytes.", None)
    given: dict[str, Any] = {name: values[0] for name, values in parse_qs(raw.decode("latin-1")).items()}
    limit, outcome, tenant = (
        given.pop("limit", str(_DEFAULT_LISTED)),
        given.pop("outcome", ""),
        given.pop("tenant", None),
    )
    if given:
        name = next(iter(given))[:64]
        raise bad_request(f"Unknown parameter {name!r}; use limit, outcome or tenant.", None)
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= MAX_LISTED):
        raise bad_request(f"limit: must be a whole number from 1 to {MAX_LISTED}.", "limit")
    if outcome and outcome not in FILTERS:
        raise bad_request(f"outcome: must be one of {', '.join(FILTERS)}.", "outcome")
    return int(limit), outcome, tenant
