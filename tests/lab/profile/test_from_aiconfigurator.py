"""Profiles from kernel timings, with a fake `aiconfigurator_core`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine_adapter.step_time.profile import Profile
from engine_adapter.step_time.profile_fit import fit_regimes, quality, split
from lab.profile.from_aiconfigurator import (
    HOST_S,
    MAX_MODEL_LEN,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    STEPS_PER_KIND,
    Point,
    points,
    profile_from_aiconfigurator,
    step_seconds,
    time_steps,
)


@dataclass
class Kernels:
    """Fake kernel timings (ms) with round numbers, for the arguments of `EngineHandle`."""

    def mixed_step_breakdown(
        self, ctx_tokens: int, gen_tokens: int, isl: int, osl: int, prefix: int = 0
    ) -> tuple[float, float, float, float]:
        chunks = ctx_tokens / isl
        tokens = ctx_tokens - chunks * prefix + gen_tokens
        # Up to 128 tokens are memory bound; each further 128 tokens cost 7 ms.
        shared = 10 + max(0.0, tokens - 128) * 0.055
        context = chunks * (isl - prefix) * (isl + prefix) / 2 * 3e-6
        decode = 0.2 + gen_tokens * (isl + osl // 2) * 8e-5 if gen_tokens else 0.0
        return shared + context + decode, shared, context, decode


def test_step_time_is_host_time_plus_kernel_timings() -> None:
    decode_only = step_seconds(Kernels(), Point(decodes=64, context=512))
    assert decode_only == pytest.approx(HOST_S + 10e-3 + (0.2 + 64 * 512 * 8e-5) / 1000)
    prefill_only = step_seconds(Kernels(), Point(chunks=1, chunk=256))
    assert prefill_only == pytest.approx(HOST_S + (10 + 128 * 0.055 + 256**2 / 2 * 3e-6) / 1000)


def test_later_chunk_adds_attention_to_earlier_tokens() -> None:
    first, later = (step_seconds(Kernels(), Point(chunks=2, chunk=100, before=s)) for s in (0, 1000))
    assert later - first == pytest.approx(2 * 100 * 1000 * 3e-6 / 1000)


def test_decodes_and_chunks_have_separate_contexts() -> None:
    kernels = Kernels()
    both = step_seconds(kernels, Point(decodes=32, context=900, chunks=1, chunk=200))
    extra = 200 + 32 - 128
    expected = 10 + extra * 0.055 + 200**2 / 2 * 3e-6 + 0.2 + 32 * 900 * 8e-5
    assert both == pytest.approx(HOST_S + expected / 1000)


def test_points_cover_each_kind_of_step_within_limits() -> None:
    found = points(200, kv_tokens=100_000, seed=3)
    assert len(found) == len(set(found)) == 600
    for p in found:
        assert p.decodes <= MAX_NUM_SEQS
        assert 0 < p.decodes + p.chunks * p.chunk <= MAX_NUM_BATCHED_TOKENS
        assert p.decodes * p.context <= 101_000
        assert max(p.context, p.chunk + p.before) <= MAX_MODEL_LEN
    assert sum(p.decodes == 0 for p in found) == sum(p.chunks == 0 for p in found) == 200
    assert points(200, 100_000, seed=3) == found
    assert points(200, 100_000, seed=4) != found


def test_fit_predicts_held_out_steps_within_two_percent() -> None:
    fitted, held_out = split(time_steps(Kernels(), points(300, 400_000, seed=0)), 0.3, seed=0)
    profile = Profile("x", "", {}, fit_regimes(fitted), 256, 2048, 8192, 400_000)
    for kind, fit in quality(profile, held_out).items():
        assert fit["r2"] > 0.995, kind
        assert fit["mape"] < 0.02, kind


# --- with a fake package ----------------------------------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Install a fake `aiconfigurator_core` with two systems and one model. It records the compiled models."""
    recorded = SimpleNamespace(compiled=[], config=None)

    def compile_(path: str, system: str, backend: str, **options: Any) -> Kernels:
        recorded.compiled.append((path, system, backend, options))
        if (Path(path) / "config.json").exists():
            recorded.config = (Path(path) / "config.json").read_text()
        return Kernels()

    class Shard:
        @classmethod
        def from_model_path(cls, path: str, **_: Any) -> Shard:
            return cls()

        def weight_bytes(self) -> int:
            return 16 << 30

        def kv_bytes_per_token(self) -> int:
            return 128 << 10

    contents: dict[str, dict[str, Any]] = {
        "": {},
        ".sdk": {},
        ".sdk.common": {"DefaultHFModels": {"maker/model-8b"}},
        ".sdk.perf_database": {
            "get_supported_databases": lambda: {"a100_sxm": {"vllm": ["0.14.0"]}, "odd": {"sglang": ["1"]}},
            "get_version_slots": lambda system, backend: {"current": "0.14.0"},
            "get_database": lambda system, backend, version: SimpleNamespace(
                system_spec={"gpu": {"mem_capacity": 80 << 30}}
            ),
        },
        ".sdk.engine": {"EngineHandle": SimpleNamespace(compile=compile_)},
        ".sdk.memory": {"NaiveKVCacheEstimator": Shard},
    }
    for name, members in contents.items():
        module = ModuleType("aiconfigurator_core" + name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["aiconfigurator_core.sdk"].perf_database = sys.modules[  # type: ignore[attr-defined]
        "aiconfigurator_core.sdk.perf_database"
    ]
    monkeypatch.setattr(metadata, "version", lambda name: "9.9")
    monkeypatch.setattr("lab.profile.from_aiconfigurator.STEPS_PER_KIND", 60)
    return recorded


def test_profile_has_provenance_and_quality(package: SimpleNamespace) -> None:
    ticks: list[None] = []
    profile, held_out = profile_from_aiconfigurator(
        "maker/model-8b", "a100_sxm", "mine", tp=2, seed=5, progress=lambda: ticks.append(None)
    )
    assert len(ticks) == 180
    assert len(held_out) == 54
    assert package.compiled == [("maker/model-8b", "a100_sxm", "vllm", {"backend_version": "0.14.0", "tp_size": 2})]
    assert profile.provenance["command"] == (
        "antares profile --from-aiconfigurator maker/model-8b a100_sxm --tp 2 --backend-version 0.14.0"
        " --name mine --seed 5"
    )
    assert "aiconfigurator-core 9.9" in profile.provenance["source"]
    assert profile.kv_tokens == (72 - 16 - 3) * 8192
    assert set(profile.quality) == {"prefill", "itl", "mixed"}


def test_unsupported_model_uses_stand_in(package: SimpleNamespace) -> None:
    profile, _ = profile_from_aiconfigurator("google/gemma-2-27b-it", "a100_sxm", "gemma", tp=4)
    assert '"hidden_size": 4608' in package.config
    assert "replace its own" in profile.description
    assert profile.provenance["stand_in"]["num_hidden_layers"] == 46
    assert not Path(package.compiled[0][0]).exists()


@pytest.mark.parametrize(
    ("model", "system", "version", "error"),
    [
        ("maker/model-8b", "z80", None, "no timings of vLLM on 'z80'; choose one of a100_sxm"),
        ("maker/model-8b", "odd", None, "no timings of vLLM on 'odd'"),
        ("model-9b", "a100_sxm", None, "unknown model 'model-9b'; choose one of google/gemma-2-27b-it, maker/model-8b"),
        ("maker/model-8b", "a100_sxm", "0.1", r"no timings of vLLM 0\.1 on a100_sxm; choose one of 0\.14\.0"),
    ],
)
@pytest.mark.usefixtures("package")
def test_unknown_choice_lists_known_ones(model: str, system: str, version: str | None, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        profile_from_aiconfigurator(model, system, "x", backend_version=version)


@pytest.mark.usefixtures("package")
def test_model_too_large_for_gpus_suggests_tp(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = sys.modules["aiconfigurator_core.sdk.memory"].NaiveKVCacheEstimator
    monkeypatch.setattr(shard, "weight_bytes", lambda self: 200 << 30)
    with pytest.raises(ValueError, match="raise --tp"):
        profile_from_aiconfigurator("maker/model-8b", "a100_sxm", "x")


def test_enough_steps_are_timed_to_measure_errors_below_one_percent() -> None:
    assert STEPS_PER_KIND >= 1000
