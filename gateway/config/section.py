"""The base class of sections, and types that several sections use."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from engine_adapter.server_url import server_url
from gateway.api.body_fields import GUARDED_FIELDS
from gateway.api.slo_headers import LONGEST_MS, SHORTEST_MS

URL_PATTERN = r"^https?://"
"""Pattern of the keys that hold a URL."""


def _checked(url: str) -> str:
    server_url(url)
    return url


ServerUrl = Annotated[str, Field(pattern=URL_PATTERN), AfterValidator(_checked)]

PositiveMs = Annotated[float, Field(ge=SHORTEST_MS, le=LONGEST_MS, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class Section(BaseModel):
    """A mapping in the file. Unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid")


def guarded(names: list[str] | None) -> list[str] | None:
    """Check that each name is a guarded field."""
    for name in names or ():
        if name not in GUARDED_FIELDS:
            guarded = ", ".join(sorted(GUARDED_FIELDS))
            raise ValueError(f"{name[:64]!r} is not a guarded field; guarded fields: {guarded}")
    return names
