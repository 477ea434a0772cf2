"""Returns whose part of the shared limits a request counts to."""

from __future__ import annotations

from engine_adapter.engine import Scope
from gateway.api.auth import ApiKey, KeyRing
from gateway.api.connections import CONNECTION_KEY
from gateway.api.shared_limit import ONLY_SHARER, Sharer


def sharer_of(scope: Scope, key: ApiKey, keys: KeyRing) -> Sharer:
    """Return the key's tenant if there are several, or the client's address without a key.

    Clients on this machine, or behind a trusted proxy, cannot be told apart by address, so they have no limit.
    """
    if key.sha256:
        return Sharer(key.tenant, key.weight) if keys.tenants > 1 else ONLY_SHARER
    connection = scope.get(CONNECTION_KEY)
    return Sharer(connection.address) if connection is not None and not connection.is_shared else ONLY_SHARER
