"""Parsing of the gate's ``vllm_xargs`` in requests to the simulated engine."""

from __future__ import annotations

from typing import Any

import pytest

from engine_adapter.service_kind import ServiceKind
from engine_adapter.simulated.request import BadRequest, Completion


def parse(**xargs: Any) -> Completion:
    return Completion.of({"prompt": "two words", "vllm_xargs": xargs}, chat=False)


@pytest.mark.parametrize(
    ("xargs", "pace_s", "kind"),
    [
        ({}, None, ServiceKind.BEST_EFFORT),
        ({"antares_tpot_ms": 30}, 0.03, ServiceKind.PACED),
        ({"antares_tpot_ms": 2500}, 2.5, ServiceKind.PACED),
        ({"antares_kind": "deadline_only"}, None, ServiceKind.DEADLINE_ONLY),
        ({"antares_kind": "best_effort", "antares_tpot_ms": 30}, 0.03, ServiceKind.BEST_EFFORT),
        ({"antares_kind": "unknown", "antares_tpot_ms": 30}, 0.03, ServiceKind.PACED),
        ({"antares_kind": 1}, None, ServiceKind.BEST_EFFORT),
        ({"antares_kind": None}, None, ServiceKind.BEST_EFFORT),
    ],
)
def test_kind_is_explicit_or_implied_by_the_pace(
    xargs: dict[str, Any], pace_s: float | None, kind: ServiceKind
) -> None:
    request = parse(**xargs)
    assert (request.pace_s, request.kind) == (pace_s, kind)


def test_gate_is_read_from_xargs() -> None:
    assert (parse().gate, parse(antares_gate="slack").gate) == ("", "slack")


@pytest.mark.parametrize("pace", [0, -1, "30", True])
def test_invalid_pace_error_names_the_field(pace: Any) -> None:
    with pytest.raises(BadRequest, match="antares_tpot_ms must be a positive number"):
        parse(antares_tpot_ms=pace)


def test_xargs_that_are_no_object_are_rejected() -> None:
    with pytest.raises(BadRequest, match="vllm_xargs must be an object"):
        Completion.of({"prompt": "p", "vllm_xargs": [1]}, chat=False)
