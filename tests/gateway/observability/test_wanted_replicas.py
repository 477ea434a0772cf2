"""Wanted replicas: the metric, `GET /replicas`, and the process that computes them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine_adapter.model_card import ModelCard
from gateway.observability import wanted_replicas
from gateway.observability.wanted_replicas import WantedReplicas, WantedSettings
from tests.fixtures.live_gateway import Live, fast_engine, gateway_config, live
from tests.fixtures.live_server import eventually

ANSWER = {
    "wanted": 3, "requests": 2, "infeasible": 1, "sampled": 1.0, "tried": {"2": 0.9, "3": 0.995}, "saturated": False,
    "held": True, "cpu_s": 0.1,
}  # fmt: skip


def _scripted(gateway: Live, code: str, **settings: Any) -> WantedReplicas:
    """Return wanted replicas of ``gateway`` whose child process runs ``code``."""
    app = gateway.gateway
    chosen = WantedSettings(enabled=True, **settings)
    return WantedReplicas(app.recorder.decisions, app.engine_queues, chosen, (sys.executable, "-S", "-c", code))


def _answering(path: Path) -> str:
    """Return the code of a child that keeps its question in ``path``, and answers `ANSWER`."""
    return f"import sys; open({str(path)!r}, 'w').write(sys.stdin.read()); print({json.dumps(json.dumps(ANSWER))})"


def _samples(wanted: WantedReplicas) -> dict[str, float]:
    return {sample.labels["model"]: sample.value for family in wanted.collect() for sample in family.samples}


async def test_replicas_are_computed_by_the_simulator_and_exported() -> None:
    async with live(wanted_replicas={"enabled": True}) as served:
        for _ in range(5):
            assert (await served.ask()).status_code == 200
        served.gateway.wanted_replicas._since -= 100.0
        await served.gateway.wanted_replicas.compute()

        document = (await served.http.get("/replicas")).json()
        metrics = (await served.http.get("/metrics")).text

    found = document["models"]["simulated"]
    assert (found["wanted"], found["engines"], found["requests"]) == (1, 1, 5)
    assert found["requests_per_second"] == pytest.approx(5 / 100, rel=0.2), "not over the time between the requests"
    assert found["why"].startswith("of 5 requests in the last 300 s, the target is 99.0%")
    assert 'antares_wanted_replicas{model="simulated"} 1.0' in metrics


async def test_question_has_sizes_and_bounds_but_no_text(tmp_path: Path) -> None:
    async with live() as served:
        await served.ask({"model": "simulated", "messages": [{"role": "user", "content": "secret " * 20}]})
        await served.ask(x_slo_ttft_ms="1")
        wanted = _scripted(served, _answering(tmp_path / "question.json"), max_replicas=9)
        await wanted.compute()

    text = (tmp_path / "question.json").read_text()
    question = json.loads(text)
    assert "secret" not in text
    assert (question["most"], question["policy"], question["target"]) == (9, "slack", 0.99)
    (_, prompt, output, ttft, tpot, e2e, predicted, _, best_effort), rejected = question["requests"]
    assert prompt >= 20
    assert (output, ttft, tpot, e2e) == (8, 5.0, 1.0, None)
    assert predicted > 0
    assert best_effort is False
    # A request that was rejected gets the length that was predicted for it.
    assert rejected[2] == rejected[6] > 0
    assert _samples(wanted) == {"simulated": 3.0}
    assert "90.0% with 2, 99.5% with 3" in wanted.document()["models"]["simulated"]["why"]
    assert "1 requests do not count" in wanted.document()["models"]["simulated"]["why"]


async def test_demand_does_not_fall_when_engines_leave(tmp_path: Path) -> None:
    """Requests of an engine that left belong to the engines of their model."""
    async with live() as served:
        for _ in range(3):
            await served.ask()
        (queue,) = served.gateway.engine_queues
        queue.engine.name = "joined later"
        await _scripted(served, _answering(tmp_path / "question.json")).compute()

    assert len(json.loads((tmp_path / "question.json").read_text())["requests"]) == 3


async def test_demand_of_an_engine_that_left_stays_with_the_pool_of_its_model(tmp_path: Path) -> None:
    """Another pool lists the model too, but as a further one."""
    async with live(more_engines=[fast_engine(name="other")]) as served:
        first, other = served.gateway.engine_queues
        for _ in range(3):
            await served.ask({"model": "simulated", "messages": [{"role": "user", "content": "hi"}]})
        first.engine.name = "joined later"
        other.engine.name = "renamed too"
        other.engine.state.set_models([ModelCard("other"), ModelCard("simulated")])
        served.gateway.engine_queues.reverse()
        wanted = _scripted(served, _answering(tmp_path / "question.json"))
        await wanted.compute()

    # The last question is about the second pool, that of the model's own engines.
    assert list(wanted.document()["models"]) == ["other", "simulated"]
    assert len(json.loads((tmp_path / "question.json").read_text())["requests"]) == 3


async def test_requests_that_were_rejected_before_they_were_measured_count_as_usual_ones(tmp_path: Path) -> None:
    async with live(server={"max_open_requests": 1}, classes={"chat": {"ttft_ms": 5000, "tpot_ms": 1000}}) as served:
        body = {"model": "simulated", "messages": [{"role": "user", "content": "word " * 50}], "max_tokens": 200}
        answers = await asyncio.gather(*(served.ask(body) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 429, 429, 429]
        await _scripted(served, _answering(tmp_path / "question.json")).compute()

    requests = json.loads((tmp_path / "question.json").read_text())["requests"]
    assert len(requests) == 4
    assert len({prompt for _, prompt, *_ in requests}) == 1, "all are as long as the one that was served"


async def test_profiles_of_a_large_fleet_are_of_engines_of_all_its_parts(tmp_path: Path) -> None:
    async with live(more_engines=[fast_engine(name=f"{number}") for number in range(1, 16)]) as served:
        for queue in served.gateway.engine_queues[8:]:
            queue.engine.state.max_num_seqs = 7
        await _scripted(served, _answering(tmp_path / "question.json")).compute()

    profiles = json.loads((tmp_path / "question.json").read_text())["profiles"]
    assert [profile["max_num_seqs"] == 7 for profile in profiles] == [False] * 4 + [True] * 4


async def test_requests_before_the_window_do_not_count(tmp_path: Path) -> None:
    async with live() as served:
        await served.ask()
        await asyncio.sleep(0.3)
        await _scripted(served, _answering(tmp_path / "question.json"), window_s=0.2).compute()

    assert json.loads((tmp_path / "question.json").read_text())["requests"] == []


@pytest.mark.parametrize("code", ["import sys; sys.exit('out of luck')", "print('not JSON')", "print('{}')"])
async def test_failed_simulation_is_reported_and_tried_again(code: str) -> None:
    async with live() as served:
        wanted = _scripted(served, code, interval_s=0.05)
        wanted.start()
        await eventually(lambda: wanted.document()["error"] is not None)
        await wanted.stop()

    assert _samples(wanted) == {}
    assert wanted.document()["models"] == {}


async def test_old_answer_disappears_from_the_metrics(tmp_path: Path) -> None:
    async with live() as served:
        wanted = _scripted(served, _answering(tmp_path / "question.json"), interval_s=0.1)
        await wanted.compute()
        assert _samples(wanted) == {"simulated": 3.0}
        await asyncio.sleep(0.1 * wanted_replicas.STALE_INTERVALS)

    assert _samples(wanted) == {}
    assert wanted.document()["models"]["simulated"]["age_s"] >= 0.5


async def test_stop_ends_the_child_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    async with live() as served:
        wanted = _scripted(served, code, interval_s=0.01)
        wanted.start()
        await eventually(lambda: pid.exists() and pid.read_text() != "")
        await wanted.stop()

    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


async def test_disabled_wanted_replicas_start_nothing() -> None:
    async with live() as served:
        served.gateway.wanted_replicas.start()
        document = (await served.http.get("/replicas")).json()
        await served.gateway.wanted_replicas.stop()

    assert document == {"enabled": False, "error": None, "models": {}}


def test_wanted_replicas_need_the_records_of_requests() -> None:
    with pytest.raises(ValidationError, match=r"decisions\.keep"):
        gateway_config(wanted_replicas={"enabled": True}, decisions={"keep": 0})
