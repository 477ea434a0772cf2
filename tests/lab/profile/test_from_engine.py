"""Profiles of a live engine: the sweep, the recorded steps, and the engine to measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine_adapter.engine import EngineEvents, EngineState
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from lab.profile import from_engine as module
from lab.profile.from_engine import (
    REPEATS,
    Round,
    Sample,
    StepRecorder,
    build_engine,
    plan_sweep,
    profile_from_engine,
    usable_steps,
)

TIMES = StepTimes(a=1e-7, b=1e-4, d=8e-3, alpha=1e-4, beta=2e-3)
STATE = EngineState(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=2048)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated engine reports each step when it ends, so there is no need to wait."""
    monkeypatch.setattr(module, "_SETTLE_S", 0.0)


def engine(scale: float = 1e-5, **options: int) -> SimulatedEngine:
    return SimulatedEngine(times=TIMES, time_scale=scale, max_num_batched_tokens=512, **options)


# --- the sweep --------------------------------------------------------------------------------------------------------


def test_sweep_has_warm_up_then_prefill_decode_and_mixed_rounds() -> None:
    rounds = plan_sweep(STATE, 16, seed=0)
    assert [one.kind for one in rounds].count("warm-up") == 1
    assert rounds[0].kind == "warm-up"
    assert all(one.in_flight == 1 and one.requests[0][1] == 1 for one in rounds if one.kind == "prefill")
    decode = [one for one in rounds if one.kind == "decode"]
    assert {one.in_flight for one in decode} == {1, 2, 3, 4, 6, 8, 12, 16}
    contexts = [one.requests[0][0] for one in decode]
    assert min(contexts) <= 20
    assert max(contexts) >= 250
    # Twice as many requests as slots, so prompts arrive while others decode.
    assert all(len(one.requests) == 2 * one.in_flight for one in rounds if one.kind == "mixed")


def test_sweep_prompts_fit_in_one_step() -> None:
    for one in plan_sweep(STATE, 64, seed=1):
        assert one.in_flight <= STATE.max_num_seqs
        for prompt, output in one.requests:
            assert 1 <= prompt <= STATE.max_num_batched_tokens - STATE.max_num_seqs
            assert prompt + output <= STATE.max_model_len


def test_sweep_is_reproducible_and_repeats_differ_in_size() -> None:
    assert plan_sweep(STATE, 8, seed=2) == plan_sweep(STATE, 8, seed=2) != plan_sweep(STATE, 8, seed=3)
    prompts = [one.requests[0][0] for one in plan_sweep(STATE, 8, seed=2) if one.kind == "prefill"]
    assert len(set(prompts)) > len(prompts) / REPEATS


async def test_profile_matches_simulated_engine() -> None:
    totals, advances = [], []
    profile, held_out = await profile_from_engine(
        engine(), "mine", "a simulation", max_batch=6, on_start=totals.append, progress=advances.append
    )
    assert sum(advances) == totals[0]
    assert {kind: fit["mape"] for kind, fit in profile.quality.items()} == {"prefill": 0, "itl": 0, "mixed": 0}
    assert len(held_out) == sum(fit["samples"] for fit in profile.quality.values())
    for decodes, length, prefill in ((1, 100, 0), (5, 300, 0), (0, 0, 100), (4, 200, 60)):
        expected = TIMES.itl(decodes, length) * (decodes > 0) + TIMES.prefill(prefill) * (prefill > 0)
        fitted = profile.step_seconds(decodes, decodes * length, prefill, 0)
        assert fitted == pytest.approx(expected * 1e-5, rel=1e-6)
    assert (profile.max_num_batched_tokens, profile.kv_tokens) == (512, 200_000)
    assert profile.provenance["source"] == "a simulation"


async def test_profiled_engine_is_stopped_with_its_own_model() -> None:
    profiled = engine()
    model = profiled.state.step_time
    await profile_from_engine(profiled, "x", "", max_batch=2)
    assert profiled.state.step_time is model
    assert not profiled.state.alive


async def test_failed_request_ends_sweep_with_engine_message() -> None:
    profiled = engine(max_model_len=500)
    await profiled.start(EngineEvents())
    try:
        with pytest.raises(RuntimeError, match=r"the engine answered 400: .*maximum context length is 500"):
            await module.run_sweep(profiled, [Round("decode", 2, ((499, 9), (499, 9)))], seed=0)
    finally:
        await profiled.stop()


async def test_dead_server_cannot_be_profiled() -> None:
    with pytest.raises(RuntimeError, match="does not answer"):
        await profile_from_engine(HttpEngine("far", "http://127.0.0.1:9"), "x", "")


# --- the samples ------------------------------------------------------------------------------------------------------


def test_recorder_keeps_every_step_and_learns() -> None:
    recorder = StepRecorder(TIMES)
    recorder.round = 4
    for _ in range(40):
        recorder.observe(2, 0, 100.0, 0.02)
    recorder.observe(0, 0, 0.0, 0.02)
    recorder.observe(1, 0, 0.0, 0.0)
    assert recorder.samples == [Sample(4, 2, 0, 100.0, 0.02)] * 40
    assert recorder.itl(2, 100) == pytest.approx(0.02, rel=0.05)


def test_usable_steps_exclude_warm_up_and_outliers() -> None:
    rounds = [Round("warm-up", 1, ()), Round("decode", 1, ()), Round("prefill", 1, ()), Round("mixed", 1, ())]
    random = np.random.default_rng(0)
    steady = [Sample(1 + i % 3, 4, 0, 100, 0.02 * random.lognormal(0, 0.1)) for i in range(300)]
    outliers = [Sample(0, 4, 0, 100, 0.02), Sample(1, 4, 0, 100, 0.5), Sample(2, 4, 0, 101, 0.003)]
    fitted, held_out = usable_steps([*outliers, *steady], rounds, seed=0)
    assert sorted([*fitted.seconds, *held_out.seconds]) == sorted(s.seconds for s in steady)
    assert set(fitted.decode_context) == {400.0}


def test_whole_rounds_of_every_kind_are_held_out() -> None:
    kinds = ["prefill", "decode", "mixed"] * 10
    rounds = [Round(kind, 1, ()) for kind in kinds]  # type: ignore[arg-type]
    samples = [Sample(number, 1 + number, 0, 50, 0.01) for number in range(30) for _ in range(5)]
    fitted, held_out = usable_steps(samples, rounds, seed=1)
    held_out_rounds = {int(d) - 1 for d in held_out.decodes}
    assert len(held_out) == 5 * len(held_out_rounds) == 45
    assert held_out_rounds.isdisjoint(int(d) - 1 for d in fitted.decodes)
    assert [sum(kinds[number] == kind for number in held_out_rounds) for kind in ("prefill", "decode", "mixed")] == [
        3,
        3,
        3,
    ]


# --- the engine to measure --------------------------------------------------------------------------------------------


def test_build_engine_accepts_url_and_config_file(tmp_path: Path) -> None:
    remote, description = build_engine("http://127.0.0.1:8000/v1")
    assert isinstance(remote, HttpEngine)
    assert "127" not in description
    config = tmp_path / "gateway.yaml"
    config.write_text(
        "engines: [{kind: simulated, max_num_seqs: 5}]\n"
        "classes: {chat: {ttft_ms: 5000, tpot_ms: 300}}\ndefault_class: chat\n"
    )
    engine, description = build_engine(str(config))
    assert (engine.state.max_num_seqs, description) == (5, "simulated engine of gateway.yaml")


def test_build_engine_rejects_missing_and_invalid_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither an http"):
        build_engine("nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("engines: []\n")
    with pytest.raises(ValueError, match=r"bad\.yaml: line 1"):
        build_engine(str(bad))
