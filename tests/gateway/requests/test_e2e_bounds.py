"""End-to-end bounds beside TTFT and TPOT: classes of both kinds in one gateway, verdicts and metrics for both."""

from __future__ import annotations

import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.policies.registry import POLICIES
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from tests.fixtures.live_gateway import fast_engine, live

CLASSES = {
    "chat": {"ttft_ms": 5000, "tpot_ms": 1000},
    "code": {"e2e_ms": 8000},
    "hasty": {"e2e_ms": 1, "on_unattainable": "best_effort"},
}


@pytest.mark.parametrize("policy", sorted(POLICIES))
async def test_classes_of_both_kinds_are_served_side_by_side_by_every_policy(policy: str) -> None:
    async with live(fast_engine(), classes=CLASSES, policy={"name": policy}) as antares:
        for name in ("chat", "code"):
            slo_report = (await antares.ask(x_slo_class=name, x_slo_report="1")).json()["antares"]
            assert slo_report["attained"], slo_report
            assert (slo_report["slo_e2e_ms"], slo_report["slo_ttft_ms"]) == (
                (None, 5000) if name == "chat" else (8000, None)
            )
        late = (await antares.ask(x_slo_class="hasty", x_slo_report="1")).json()["antares"]
        assert late["violated"] == ["e2e"]
        text = (await antares.http.get("/metrics")).text
        broken = next(line for line in text.splitlines() if line.startswith("antares_slo_violations_total{"))
        assert 'bound="e2e"' in broken and 'slo_class="hasty"' in broken and broken.endswith(" 1.0")
        met = [line for line in text.splitlines() if line.startswith("antares_requests_attained_total{")]
        assert sorted(name for name in CLASSES for line in met if f'slo_class="{name}"' in line) == ["chat", "code"]


async def test_an_end_to_end_bound_no_engine_could_meet_is_refused_by_annealing_in_its_own_terms() -> None:
    slow = fast_engine(times=StepTimes(d=0.01, alpha=0.01))
    async with live(slow, classes={"code": {"e2e_ms": 20}}, default_class="code", policy={"name": "annealing"}) as it:
        answer = await it.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "e2e_unattainable")


@pytest.mark.parametrize("tokens", [1.0, 40.0, 300.0, 3000.0])
@pytest.mark.parametrize("ttft_s", [0.05, 0.5, 4.0])
def test_the_bound_that_would_do_does(tokens: float, ttft_s: float) -> None:
    asked = Request("r", "code", 0.0, Slo(e2e_s=1.0), 10, tokens)
    for bound in (asked.e2e_for_ttft(ttft_s), asked.e2e_for_ttft(ttft_s) * 0.98):
        again = Request("r", "code", 0.0, Slo(e2e_s=bound), 10, tokens)
        assert (again.ttft_slo_s >= ttft_s * (1 - 1e-9)) == (bound == asked.e2e_for_ttft(ttft_s))
    paced = Request("r", "code", 0.0, Slo(e2e_s=asked.e2e_for_tpot(0.05)), 10, tokens)
    assert paced.tpot_slo_s is not None
    assert paced.tpot_slo_s >= 0.05 * (1 - 1e-9)
