"""The open requests as a shared limit, which tenants share, and within each tenant its SLO classes."""

from __future__ import annotations

from gateway.api.shared_limit import FREE_FACTOR, SharedLimit, Sharer


class OpenRequests(SharedLimit):
    """A shared limit whose part of a tenant is shared by its classes, by the same rule and with equal weights.

    So a flood of one class leaves room for the others. A class that holds none gets in while its tenant may take one.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._of_class: dict[tuple[str, str], int] = {}

    def enter(self, sharer: Sharer, slo_class: str) -> bool:
        """Count a request that begins; return False if its tenant or its class holds too many.

        ``slo_class`` is empty if there is only one, which may then take the whole part of its tenant.
        """
        held = self._of_class.get((sharer.name, slo_class), 0) if slo_class else 0
        if (held and held + 1 > FREE_FACTOR * (self.left(sharer) - 1)) or not self.try_take(sharer):
            return False
        if slo_class:
            self._of_class[sharer.name, slo_class] = held + 1
        return True

    def leave(self, sharer: Sharer, slo_class: str) -> None:
        """Count a request that ends, with the arguments of its `enter`."""
        self.free(sharer)
        if slo_class:
            held = self._of_class.pop((sharer.name, slo_class)) - 1
            if held:
                self._of_class[sharer.name, slo_class] = held
