"""End-to-end bounds beside TTFT and TPOT bounds: admission, SLO reports, metrics, and the paces that they imply."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.policies.registry import POLICIES
from gateway.requests.request import E2E_LEAST_FOR_TTFT, E2E_MOST_FOR_TTFT
from tests.fixtures.live_gateway import fast_engine, live
from tests.fixtures.policy_builders import make_request

CLASSES = {
    "chat": {"ttft_ms": 5000, "tpot_ms": 1000},
    "code": {"e2e_ms": 8000},
    "hasty": {"e2e_ms": 1, "on_unattainable": "best_effort"},
}


@pytest.mark.parametrize("policy", sorted(POLICIES))
async def test_every_policy_serves_classes_with_either_kind_of_bound(policy: str) -> None:
    async with live(fast_engine(), classes=CLASSES, policy={"name": policy}) as antares:
        for name in ("chat", "code"):
            slo_report = (await antares.ask(x_slo_class=name, x_slo_report="1")).json()["antares"]
            assert slo_report["attained"], slo_report
            bounds = (None, 5000) if name == "chat" else (8000, None)
            assert (slo_report["slo_e2e_ms"], slo_report["slo_ttft_ms"]) == bounds
        late = (await antares.ask(x_slo_class="hasty", x_slo_report="1")).json()["antares"]
        assert late["violated"] == ["e2e"]
        lines = (await antares.http.get("/metrics")).text.splitlines()
        (violation,) = [line for line in lines if line.startswith("antares_slo_violations_total{")]
        assert 'bound="e2e"' in violation
        assert 'slo_class="hasty"' in violation
        assert violation.endswith(" 1.0")
        attained = [line for line in lines if line.startswith("antares_requests_attained_total{")]
        assert sorted(name for name in CLASSES for line in attained if f'slo_class="{name}"' in line) == [
            "chat",
            "code",
        ]


async def test_annealing_rejects_an_infeasible_end_to_end_bound_by_name() -> None:
    slow = fast_engine(times=StepTimes(d=0.01, alpha=0.01))
    classes, policy = {"code": {"e2e_ms": 20}}, {"name": "annealing"}
    async with live(slow, classes=classes, default_class="code", policy=policy) as antares:
        answer = await antares.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "e2e_unattainable")


@pytest.mark.parametrize("tokens", [1.0, 40.0, 300.0, 3000.0])
@pytest.mark.parametrize("ttft_s", [0.05, 0.5, 4.0])
def test_end_to_end_bound_for_a_ttft_is_the_least_that_leaves_it(tokens: float, ttft_s: float) -> None:
    bound_s = make_request(e2e=1.0, output=tokens).e2e_for_ttft(ttft_s)
    assert make_request(e2e=bound_s, output=tokens).ttft_slo_s >= ttft_s * (1 - 1e-9)
    assert make_request(e2e=0.98 * bound_s, output=tokens).ttft_slo_s < ttft_s * (1 - 1e-9)


@pytest.mark.parametrize("tokens", [1.0, 40.0, 300.0, 3000.0])
def test_end_to_end_bound_for_a_tpot_leaves_that_pace(tokens: float) -> None:
    request = make_request(e2e=make_request(e2e=1.0, output=tokens).e2e_for_tpot(0.05), output=tokens)
    assert request.pace_s is not None
    assert request.pace_s >= 0.05 * (1 - 1e-9)


@given(st.floats(0.01, 100), st.floats(0, 5000), st.none() | st.floats(0.001, 2), st.none() | st.floats(0.1, 50))
def test_first_token_and_pace_together_use_the_end_to_end_bound(
    e2e_s: float, tokens: float, tpot_s: float | None, ttft_s: float | None
) -> None:
    request = make_request(e2e=e2e_s, output=tokens, tpot=tpot_s, ttft=ttft_s)
    assert request.pace_s is not None
    assert request.ttft_slo_s + request.pace_s * max(tokens, 1) <= e2e_s * (1 + 1e-9)
    assert request.ttft_slo_s == min(e2e_s * request.e2e_share_for_ttft, ttft_s or math.inf)
    assert request.pace_s <= (tpot_s or math.inf)
    assert E2E_LEAST_FOR_TTFT <= request.e2e_share_for_ttft <= E2E_MOST_FOR_TTFT
