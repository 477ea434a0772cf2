"""What `antares simulate --config` takes from the configuration of a gateway: SLO classes, policy and routing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gateway.requests.slo import SloClass
from lab.workload import WorkloadRequest

Bounds = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Settings of a gateway's configuration.

    ``classes``: in the order of the file. ``policies``: its policy as ``--policy`` writes it; empty if the file sets
    none. ``routing``: None if the file sets none.
    """

    classes: tuple[SloClass, ...] = ()
    policies: tuple[str, ...] = ()
    routing: str | None = None

    def slo_table(self) -> tuple[Bounds, ...]:
        """Return the TTFT bound (s), TPOT bound (ms) and end-to-end bound (s) of each class, for `make_workload`."""
        return tuple((ttft_s, tpot_s * 1000, e2e_s) for ttft_s, tpot_s, e2e_s in map(_bounds_s, self.classes))


def read_settings(path: Path) -> GatewaySettings:
    """Return the settings of the configuration at ``path``. Its keys file and the environment are not read.

    Raises:
        ValueError: the file is invalid, or has no class with a bound.
    """
    # NOTE: imported here, because the process that finds the wanted replicas imports this module and needs none of it.
    from gateway.config.file import load
    from gateway.config.mistakes import ConfigError

    try:
        config = load(path, env={}, keys=[])
    except ConfigError as error:
        if any(mistake.key == "classes" for mistake in error.mistakes):
            raise ValueError(
                f"{path} has no SLO classes: add `classes` with the bounds of your requests, or replace --config with "
                "--slo-table"
            ) from error
        raise ValueError(str(error)) from error
    classes = tuple(config.slo_classes().values())
    if all(min(_bounds_s(one)) == math.inf for one in classes):
        raise ValueError(f"no class of {path} has a bound, so any answer attains it: set ttft_ms, tpot_ms or e2e_ms")
    policy, routing = config.policy, config.routing
    return GatewaySettings(
        classes,
        (_policy_text(policy.name, policy.options),) if "policy" in config.model_fields_set else (),
        routing.name if "routing" in config.model_fields_set else None,
    )


def with_classes(
    workload: Sequence[WorkloadRequest], classes: Sequence[SloClass], slo_scale: float
) -> list[WorkloadRequest]:
    """Return ``workload`` with the class of each request: the one at its category, or of that name in a recording.

    A recorded request gets the bounds of its class, times ``slo_scale``, in place of its own.

    Raises:
        ValueError: a recording has a class that ``classes`` do not have.
    """
    by_name = {one.name: one for one in classes}
    found = []
    for request in workload:
        if not request.slo_class:
            slo_class = classes[request.category - 1]
            bounds_s: Sequence[float] = (request.ttft_slo_s, request.tpot_slo_s, request.e2e_slo_s)
        elif request.slo_class in by_name:
            slo_class = by_name[request.slo_class]
            bounds_s = [bound * slo_scale for bound in _bounds_s(slo_class)]
        else:
            raise ValueError(
                f"the recording has requests of class {request.slo_class!r}, and --config has only the classes "
                f"{', '.join(by_name)}: add the class, or remove --config to simulate the recorded bounds"
            )
        ttft_s, tpot_s, e2e_s = bounds_s
        found.append(
            replace(
                request,
                ttft_slo_s=ttft_s,
                tpot_slo_s=tpot_s,
                e2e_slo_s=e2e_s,
                slo_class=slo_class.name,
                best_effort=slo_class.on_unattainable == "best_effort",
            )
        )
    return found


def _bounds_s(slo_class: SloClass) -> Bounds:
    """Return the TTFT, TPOT and end-to-end bounds (s); infinite without a bound."""
    slo = slo_class.slo
    ttft_s, tpot_s, e2e_s = (math.inf if bound is None else bound for bound in (slo.ttft_s, slo.tpot_s, slo.e2e_s))
    return ttft_s, tpot_s, e2e_s


def _policy_text(name: str, options: Mapping[str, Any]) -> str:
    """Return a policy in the form of `lab.simulate.experiment.policy_spec`."""
    return name + ":" * bool(options) + ",".join(f"{option}={value}" for option, value in options.items())
