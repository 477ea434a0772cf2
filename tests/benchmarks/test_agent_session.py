"""benchmarks.live.agent_session: scripted sessions, bounds from a calibration, and the page."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from benchmarks.live.agent_session import Bounds, adherence, bounds_from, flags_text, prediction_errors, session, tools
from benchmarks.live.agent_session_page import page, wrong_rejections


def served(turn: int, ttft_ms: float, predicted_ms: float, *, attained: bool = True) -> dict[str, Any]:
    return {
        "agent": 0, "turn": turn, "status": 200, "attained": attained, "ttft_ms": ttft_ms, "predicted_ms": predicted_ms,
        "tpot_ms": 20.0, "prompt": 1000 + 100 * turn, "cached": 900 * (turn > 0),
    }  # fmt: skip


def rejected(turn: int) -> dict[str, Any]:
    return {"agent": 0, "turn": turn, "status": 429, "code": "ttft_unattainable", "predicted_ms": 9.0}


def test_session_resends_a_growing_history() -> None:
    turns = session(40, seed=0, nonce="x")
    assert len(turns) == 40
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(turns))
    calls = [len(message["tool_calls"]) for message in turns[-1] if message.get("tool_calls")]
    assert 80 <= sum(calls) <= 120
    assert max(calls) > 1
    assert sum(message["role"] == "tool" for message in turns[-1]) == sum(calls)
    names = {tool["function"]["name"] for tool in tools()}
    assert {call["function"]["name"] for m in turns[-1] for call in m.get("tool_calls", ())} <= names


def test_session_differs_in_its_first_message_by_nonce() -> None:
    assert session(3, 0, "a")[0][0] != session(3, 0, "b")[0][0]
    assert session(3, 0, "a")[2][1:] == session(3, 0, "b")[2][1:]


def test_bounds_follow_the_calibration() -> None:
    records = [served(0, 900.0, 0.0), *(served(turn, 100.0 + 10 * turn, 0.0) for turn in range(1, 9))]
    bounds = bounds_from(records, multiple=2.0)
    assert bounds == Bounds(1800.0, 200.0, 20.0, 40.0)
    assert (bounds.ttft_ms(0), bounds.ttft_ms(5)) == (1800.0, 300.0)


def test_adherence_and_errors_count_rejections_as_missed() -> None:
    records = [served(0, 100.0, 50.0), served(1, 100.0, 110.0, attained=False), rejected(2)]
    assert adherence(records) == pytest.approx(1 / 3)
    assert prediction_errors(records) == pytest.approx([-0.5, 0.1])


def test_wrong_rejections_are_those_that_stock_vllm_attained() -> None:
    stock = {"records": [served(0, 1.0, 1.0), served(1, 1.0, 1.0, attained=False), served(2, 1.0, 1.0)]}
    assert wrong_rejections({"records": [served(0, 1.0, 1.0), rejected(1), rejected(2)]}, stock) == 1


def test_page_has_runs_bounds_and_commands() -> None:
    runs = [
        {"agents": 1, "round": 0, "policy": "fcfs", "records": [served(0, 100.0, 50.0), served(1, 100.0, 90.0)]},
        {"agents": 1, "round": 0, "policy": "slack", "records": [served(0, 100.0, 80.0), rejected(1)]},
    ]
    bounds = {"first_ms": 1800.0, "base_ms": 200.0, "turn_ms": 20.0, "tpot_ms": 40.0}
    group = {"agents": 1, "bounds": bounds, "calibration": [served(0, 1.0, 1.0), served(1, 1.0, 1.0)]}
    text = page(
        {
            "seed": 0, "turns": 2, "calls": 3, "rounds": 1, "multiple": 2.0, "output_tokens": 16, "cpus": 2,
            "flags": flags_text(), "groups": [group], "runs": runs,
        }
    )  # fmt: skip
    assert "| 1 | 1 | `fcfs` (stock vLLM) | 1.000 | 0 (0 wrongly) | 0.429 | 100 | 30% / 46% | -30% |" in text
    assert "| 1 | 1 | `slack` | 0.500 | 1 (1 wrongly) | 0.000 | 100 | 20% / 20% | -20% |" in text
    assert "first turn 1,800 ms, then 200 + 20.0 * turn ms; TPOT 40 ms" in " ".join(text.split())
    assert "enable-prefix-caching True" in text
    assert "chat-template" not in text
