"""The section of one API key."""

from __future__ import annotations

import re

from pydantic import AwareDatetime, Field, field_validator

from gateway.config.section import ModelName, Name, PositiveMs, Section, guarded


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
    operator: bool = Field(False, description="The key may reload the configuration.")

    _are_guarded = field_validator("allowed_fields")(guarded)

    @field_validator("sha256")
    @classmethod
    def _is_digest(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("must be the 64 hex digits that `antares config hash-key` prints, not the key itself")
        return value
