"""Sections of the HTTP edge: the address, CORS, guarded body fields, and what one client may hold."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gateway.api.body_fields import DEFAULT_ALLOWED
from gateway.api.limits import Limits
from gateway.config.section import Section, guarded

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s*?#]+")


class CorsConfig(Section):
    """Which web pages may call the API from a browser. No page by default."""

    allow_origins: list[str] = Field(min_length=1, max_length=256)
    allow_headers: list[str] = Field(default_factory=lambda: ["*"], max_length=128)
    max_age_s: int = Field(600, ge=0, le=86_400, description="How long a browser may reuse a preflight's answer.")

    @field_validator("allow_origins")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin[:64]!r} is not an origin; write scheme://host[:port] in lower case without a path, or '*'"
                )
        if "*" in value and len(value) > 1:
            raise ValueError("'*' allows every origin, so it must be the only entry")
        return value


class BodyFieldsConfig(Section):
    """Body fields that reach beyond their own request: which ones pass, and what happens to the others."""

    allow: list[str] = Field(default_factory=lambda: list(DEFAULT_ALLOWED), max_length=64)
    on_denied: Literal["strip", "reject"] = "strip"
    prefix_isolation: bool = Field(
        False, description="Whether tenants share no prefix cache: each request gets a cache salt of its tenant."
    )

    _are_guarded = field_validator("allow")(guarded)


class ServerConfig(Section):
    """Listening address and limits of the gateway."""

    host: str = "127.0.0.1"
    port: int = Field(8100, ge=0, le=65535)
    processes: int = Field(
        1, ge=1, le=32, description="Processes that share the port and divide the engines (docs/scale.md)."
    )
    allow_anonymous: bool = Field(
        False, description="Serve without API keys on an address that other machines can reach."
    )
    operator_auth: bool | None = Field(
        None, description="Whether the operator's pages need a key; null: if other machines can reach them."
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30)
    max_open_requests: int = Field(4096, ge=1, description="Open requests above which new ones get 429 queue_full.")
    max_pass_through: int = Field(
        32, ge=1, description="Requests outside scheduling that one engine serves at a time; further ones wait."
    )
    pass_through_routes: list[Annotated[str, Field(pattern=r"^/v1/[A-Za-z0-9._/-]+$")]] = Field(
        default_factory=list, description="More paths under /v1 that reach an engine without scheduling."
    )
    cors: CorsConfig | None = Field(None, description="Cross-origin requests of browsers; null denies them.")
    sse_keep_alive_s: float | None = Field(
        None, ge=0.1, le=3600, description="Silence after which a stream that waits gets a comment; null sends none."
    )
    body_fields: BodyFieldsConfig = Field(default_factory=BodyFieldsConfig)
    drain_s: float = Field(30.0, ge=0, le=3600, description="Time that SIGTERM allows for open requests to finish.")


class LimitsConfig(Section):
    """What one client can make the gateway hold: connections, memory and time (docs/limits.md)."""

    max_head_bytes: int = Field(64 << 10, ge=4096, le=1 << 20, description="Largest request head; above it 431.")
    head_timeout_s: float = Field(15.0, ge=0.1, le=3600, description="Time for a client to send a request head.")
    idle_timeout_s: float = Field(75.0, ge=0.1, le=86_400, description="Time between two requests of a connection.")
    stall_s: float = Field(30.0, ge=0.1, le=3600, description="Time for which a client may stall while data is due.")
    min_bytes_per_s: int = Field(1024, ge=1, le=1 << 30, description="Slowest client, measured over stall_s.")
    response_buffer_bytes: int = Field(
        8 << 20, ge=1 << 16, le=1 << 30, description="Data of one response that may wait for its client."
    )
    response_memory_bytes: int = Field(256 << 20, ge=1 << 16, description="The same for all responses together.")
    body_memory_bytes: int = Field(512 << 20, ge=1 << 16, description="Bodies of all open requests together.")
    max_connections: int | None = Field(None, ge=1, description="Null: what the limit on descriptors allows.")
    max_connections_per_client: int | None = Field(None, ge=1, description="Null: three quarters of max_connections.")
    trusted_proxies: list[Annotated[str, Field(max_length=64)]] = Field(
        default_factory=list, max_length=256, description="Addresses or networks without a limit per client."
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        for network in value:
            ipaddress.ip_network(network, strict=False)
        return value

    def limits(self) -> Limits:
        """Convert to the type that the HTTP edge uses."""
        return Limits(**{**self.model_dump(), "trusted_proxies": tuple(self.trusted_proxies)})
