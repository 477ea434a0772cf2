"""Sections of the API keys, and the rights that they give."""

from __future__ import annotations

import re
from typing import Any

from pydantic import AwareDatetime, Field, field_validator, model_validator

from gateway.api.auth import ApiKey
from gateway.config.section import ModelName, Name, PositiveMs, Section, guarded
from gateway.tenants.limits import LIMITS, TenantLimits


class KeyConfig(Section):
    """An API key, given by its digest (`antares config hash-key`), and the SLOs that it may request."""

    sha256: str
    tenant: Name
    default_class: str | None = None
    allowed_classes: list[str] | None = None
    min_ttft_ms: PositiveMs | None = None
    min_tpot_ms: PositiveMs | None = None
    min_e2e_ms: PositiveMs | None = None
    allowed_fields: list[str] | None = Field(None, max_length=64)
    allowed_models: list[ModelName] | None = Field(None, max_length=256)
    expires: AwareDatetime | None = Field(None, description="Time from which the key is refused.")
    weight: float = Field(1.0, gt=0, le=1000, description="The tenant's share of an engine, relative to the others.")
    requests_per_minute: int | None = Field(None, ge=1, le=10_000_000)
    tokens_per_minute: int | None = Field(None, ge=1, le=10_000_000_000)
    max_concurrent: int | None = Field(None, ge=1, le=1_000_000, description="Requests that are open at a time.")
    operator: bool = Field(False, description="The key may read and reload the gateway.")

    _are_guarded = field_validator("allowed_fields")(guarded)

    @field_validator("sha256")
    @classmethod
    def _is_digest(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("must be the 64 hex digits that `antares config hash-key` prints, not the key itself")
        return value

    def api_key(self, default_class: str, allowed_fields: frozenset[str]) -> ApiKey:
        """Return the key for the key ring. The arguments count unless the key has its own."""
        bounds = {"ttft": self.min_ttft_ms, "tpot": self.min_tpot_ms, "e2e": self.min_e2e_ms}
        return ApiKey(
            tenant=self.tenant,
            default_class=self.default_class or default_class,
            sha256=self.sha256,
            allowed_classes=None if self.allowed_classes is None else frozenset(self.allowed_classes),
            least_bounds={bound: ms / 1000 for bound, ms in bounds.items() if ms is not None},
            allowed_fields=allowed_fields if self.allowed_fields is None else frozenset(self.allowed_fields),
            allowed_models=None if self.allowed_models is None else frozenset(self.allowed_models),
            expires_s=None if self.expires is None else self.expires.timestamp(),
            weight=self.weight,
            operator=self.operator,
        )

    @property
    def limits(self) -> TenantLimits:
        """The limits of its tenant."""
        return TenantLimits(self.requests_per_minute, self.tokens_per_minute, self.max_concurrent)


SHARED = ("weight", *LIMITS)
"""Settings in which all keys of a tenant agree, because they are the tenant's."""


class KeysFileConfig(Section):
    """The keys file: its path, relative to the configuration, and the keys that were read from it."""

    path: str = Field(min_length=1, max_length=4096)
    keys: list[KeyConfig] = Field(default_factory=list, max_length=10_000)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value
