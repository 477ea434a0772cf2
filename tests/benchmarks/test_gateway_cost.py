"""benchmarks.overhead.gateway_cost: runs real server processes and reports the cost added to the engine alone."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.overhead import gateway_cost
from benchmarks.overhead.gateway_cost import ONE_TOKEN, SERVERS, Case, check_answers, costs, measure, page
from lab.bench.client_request import ClientResult


def record(
    server: str, case: str, cpu_us: float, at: int = 0, tpot_ms: float = 4.0, ttft_ms: float = 5.0
) -> dict[str, object]:
    return {
        "server": server, "case": case, "round": at, "cpu_us_a_request": 10 * cpu_us, "cpu_us_a_token": cpu_us,
        "ttft_p50_ms": ttft_ms, "ttft_p99_ms": 2 * ttft_ms, "tpot_p50_ms": tpot_ms,
    }  # fmt: skip


RUNS = [
    *(
        record(name, ONE_TOKEN, cpu, at, tpot_ms=0.0)
        for at in (0, 1)
        for name, cpu in zip(SERVERS, (50, 80, 90), strict=True)
    ),
    *(record("alone", "streams", 30.0, at) for at in (0, 1)),
    *(record("around", "streams", 40.0 + 2 * at, at, tpot_ms=4.2, ttft_ms=6.0) for at in (0, 1)),
    *(record("in front", "streams", 25.0, at, ttft_ms=9.0) for at in (0, 1)),
]


def test_costs_subtract_engine_for_around_but_not_in_front() -> None:
    rows = {(row["case"], row["server"]): row for row in costs(RUNS)}
    assert {key: (row["of"], row["cpu_us"]) for key, row in rows.items()} == {
        (ONE_TOKEN, "around"): ("request", 300.0),
        (ONE_TOKEN, "in front"): ("request", 900.0),
        ("streams", "around"): ("token", 11.0),
        ("streams", "in front"): ("token", 25.0),
    }
    around, in_front = rows["streams", "around"], rows["streams", "in front"]
    assert around["cpu_us_sd"] == pytest.approx(2**0.5)
    assert (around["ttft_p50_ms"], in_front["ttft_p99_ms"]) == (1.0, 8.0)
    assert (around["tpot_ratio"], rows[ONE_TOKEN, "around"]["tpot_ratio"]) == (pytest.approx(1.05), None)


def test_page_has_rows_and_command() -> None:
    text = page({"rounds": 2, "runs": RUNS})
    assert "| streams | around | 11 (1) per token | 30 | +1.0 | +2.0 | 1.050 |" in text
    assert f"| {ONE_TOKEN} | in front | 900 (0) per request | 500 |" in text
    assert "python -m benchmarks.overhead.gateway_cost --json > docs/results/gateway_cost.json" in text


@pytest.mark.parametrize("server", SERVERS[1:])
async def test_measure_serves_all_requests(server: str) -> None:
    found = await measure(server, Case("few", requests=6, over_s=0.1, tokens=40, step_ms=10.0), 0)
    assert (found["server"], found["case"]) == (server, "few")
    assert found["cpu_us_a_request"] >= 0
    assert found["tpot_p50_ms"] > 5
    assert 0 < found["ttft_p50_ms"] <= found["ttft_p99_ms"]


@pytest.mark.parametrize("broken", [ClientResult("failed", "no"), ClientResult("finished", tokens=4)])
def test_check_answers_rejects_incomplete_answers(broken: ClientResult) -> None:
    case = Case("few", requests=2, over_s=0.1, tokens=5, step_ms=2.0)
    check_answers("alone", case, [ClientResult("finished", tokens=5)] * 2)
    with pytest.raises(RuntimeError, match=r"few, alone: 1 incomplete answers, the first: (no|4 tokens)"):
        check_answers("alone", case, [ClientResult("finished", tokens=5), broken])


def test_command_rejects_zero_rounds() -> None:
    app = gateway_cost.typer.Typer()
    app.command()(gateway_cost.main)
    assert CliRunner().invoke(app, ["--rounds", "0"]).exit_code == 2
