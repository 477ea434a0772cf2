"""Section of a gateway that shares the engines with other gateways (docs/scale.md)."""

from __future__ import annotations

import re
import socket

from pydantic import Field, model_validator

from gateway.config.section import Section
from gateway.scheduling.shards import Shard

MAX_SHARDS = 64
"""Most gateway processes that divide the engines."""


class ShardConfig(Section):
    """Which share of the engines this gateway has, of ``count`` gateways with equal configurations."""

    index: int | None = Field(None, ge=0, description="From 0; null: the number at the end of the host's name.")
    count: int = Field(1, ge=1, le=MAX_SHARDS, description="Gateways that divide the engines.")

    @model_validator(mode="after")
    def _is_one_of_count(self) -> ShardConfig:
        if self.index is not None and self.index >= self.count:
            raise ValueError(
                f"index is {self.index}, but {self.count} gateways have the indexes 0 to {self.count - 1}; "
                "set count to the number of gateways, the same for all"
            )
        return self

    def shard(self, host: str | None = None) -> Shard:
        """Return the share. ``host``: the host's name, by default this one's.

        Raises:
            ValueError: without ``index``, the name has no number, or one that is too large.
        """
        if self.index is not None or self.count == 1:
            return Shard(self.index or 0, self.count)
        name = socket.gethostname() if host is None else host
        number = re.search(r"(\d+)$", name.partition(".")[0])
        if number is None or int(number[1]) >= self.count:
            raise ValueError(
                f"shard.index is not set, and the host's name {name!r} does not end in a number from 0 to "
                f"{self.count - 1}; set shard.index or ANTARES_SHARD_INDEX"
            )
        return Shard(int(number[1]), self.count)

    def document(self) -> dict[str, int]:
        """Return the share for `/status`."""
        shard = self.shard()
        return {"index": shard.index, "count": shard.count}
