"""benchmarks.scale.kill: it kills a simulated server, judges what it saw, and its page states it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.scale import kill, kill_page

GOOD: dict[str, Any] = {
    "servers": "http", "seed": 0, "requests": 150, "in_flight": 6, "broken": 6, "broken_within_s": 0.01,
    "others": 144, "completed": 143, "moved": 2, "rejected": 1, "new_first_s": 9, "new_ttft_s": 1.25,
    "new_while_down": 20,
    "closed_s": 0.01, "leaves_s": 0.02, "shown_s": 0.08, "back_s": 40.0, "taken": 9, "ended_s": 1.5,
    "lost": 0, "leaked_requests": 0, "leaked_descriptors": 0, "memory_mb": 1.0, "ends": {"200": 143}, "problems": [],
    "ledger": {"accepted": 160, "open": 0, "finished": 153, "failed": 6, "rejected": 1, "cancelled": 0},
}  # fmt: skip


@pytest.mark.timeout(120)
def test_study_kills_one_of_two_simulated_servers() -> None:
    row = asyncio.run(kill.measure("http", "simulated", seed=1, warm_s=1.0))
    assert row["problems"] == []
    assert row["broken"] == row["in_flight"] >= kill.IN_FLIGHT
    assert row["completed"] == row["others"] > kill.CLIENTS
    assert row["ledger"]["failed"] == row["in_flight"]
    assert row["taken"] >= kill.TAKEN
    assert "| two HTTP servers |" in kill_page.page(
        {"engine": "simulated", "seed": 1, "runs": 1, "cpus": 2, "rows": [row]}
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"in_flight": 0, "broken": 0}, "no stream was in flight on the killed server"),
        ({"broken": 4}, "2 streams in flight did not end with a clear error"),
        ({"completed": 140}, "3 other requests did not complete"),
        ({"leaves_s": 1.5}, "new requests went to the killed server 1.5 s after the kill"),
        ({"new_first_s": 0}, "no request was sent in 1 s after the kill"),
        ({"taken": 1}, "the replacement served 1 requests"),
        ({"ledger": {**GOOD["ledger"], "finished": 152}}, "the ledger does not balance"),
        ({"ledger": {**GOOD["ledger"], "open": 1}}, "the ledger does not balance"),
        ({"ended_s": None}, "a process of the killed server still runs"),
    ],
)
def test_every_failed_check_is_named(change: dict[str, Any], problem: str | None) -> None:
    found = kill.problems({**GOOD, **change})
    assert [line.startswith(problem or "-") for line in found] == [True] * (problem is not None)


def test_page_has_medians_ranges_and_failed_checks() -> None:
    rows = [GOOD, {**GOOD, "seed": 1, "leaves_s": 0.5, "problems": ["lost: 2"]}, {**GOOD, "seed": 2, "leaves_s": 0.1}]
    text = kill_page.page({"engine": "vllm", "seed": 0, "runs": 3, "cpus": 2, "rows": rows})
    assert "Median (range) of 3 runs, seeds 0 to 2." in text
    assert "| last request to the killed server, s | 0.100 (0.020 to 0.500) |" in text
    assert "| of them ended by an error event | 18 of 18 |" in text
    assert "| their TTFT, s, in the median | 1.25 (1.25 to 1.25) |" in text
    assert "480 accepted: 459 finished, 18 failed, 3 rejected, 0 cancelled" in text
    assert "- http, seed 1: lost: 2" in text
    assert "benchmarks.scale.kill --runs 3 --json" in text
    assert "benchmarks.scale.kill --seed 4 --runs 1" in kill_page.page(
        {"engine": "vllm", "seed": 4, "runs": 1, "cpus": 2, "rows": rows[:1]}
    )


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["lost: 1"], 1)])
def test_command_fails_when_a_check_does(monkeypatch: pytest.MonkeyPatch, problems: list[str], code: int) -> None:
    async def scripted(kind: str, engine: str, seed: int) -> dict[str, Any]:
        return {**GOOD, "servers": kind, "seed": seed, "problems": problems}

    monkeypatch.setattr(kill, "measure", scripted)
    app = kill.typer.Typer()
    app.command()(kill.main)
    result = CliRunner().invoke(app, ["--servers", "ray", "--seed", "5", "--json"])
    assert result.exit_code == code
    assert ("FAILED: ray, seed 5: lost: 1" in result.output) == bool(code)


def test_run_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scripted(kind: str, engine: str, seed: int) -> dict[str, Any]:
        raise TimeoutError("not within 600 s")

    monkeypatch.setattr(kill, "measure", scripted)
    app = kill.typer.Typer()
    app.command()(kill.main)
    result = CliRunner().invoke(app, ["--servers", "http"])
    assert result.exit_code == 1
    assert "FAILED: http, seed 0: not within 600 s" in result.output
