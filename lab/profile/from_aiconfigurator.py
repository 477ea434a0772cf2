"""Step-time profile of a GPU from NVIDIA's published kernel timings (`aiconfigurator-core`), without the GPU.

The time of a step is the sum of three kernel timings and `HOST_S`. The library adds the same timings for a mixed step:

- all kernels except attention, over all tokens of the step,
- attention of the prefill chunks,
- attention of the decodes.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine_adapter.step_time.profile import Profile
from engine_adapter.step_time.profile_fit import Steps, fit_regimes, quality, split

HOST_S = 1.5e-3
"""Host time of every step (s): scheduling, input preparation, sampling and detokenisation; an assumption."""

MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2048
MAX_MODEL_LEN = 8192

STEPS_PER_KIND = 1500
"""Steps timed for each of decode only, prefill only and both; enough to tell errors below one percent apart."""

HELD_OUT = 0.3
"""Fraction of the steps held out to measure the quality of the fit."""

STAND_INS: dict[str, dict[str, Any]] = {
    "google/gemma-2-27b-it": {
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
    }
}
"""Models that the library does not support, as Llama layers of the same dimensions.

The matrices are the same. Extra norms and soft-capping are missing. Every layer attends to the whole context, while
every second layer of Gemma-2 attends to 4096 tokens.
"""


class KernelTimings(Protocol):
    """The methods of `aiconfigurator_core.sdk.engine.EngineHandle` that this module calls."""

    def mixed_step_breakdown(
        self, ctx_tokens: int, gen_tokens: int, isl: int, osl: int, prefix: int = 0
    ) -> tuple[float, float, float, float]:
        """Return milliseconds: total, without attention, attention of the prefill, attention of the decodes."""


@dataclass(frozen=True, slots=True)
class Point:
    """One step to time. Sizes in tokens.

    Attributes:
        decodes: number of decoding sequences.
        context: mean context of the decoding sequences.
        chunks: number of prefill chunks.
        chunk: size of each chunk.
        before: tokens of the same prompt that were computed before each chunk.
    """

    decodes: int = 0
    context: int = 0
    chunks: int = 0
    chunk: int = 0
    before: int = 0


def step_seconds(kernels: KernelTimings, point: Point) -> float:
    """Return the time (s) of the step ``point``."""
    prefill = point.chunks * point.chunk
    # NOTE: for a prompt of n tokens with p of them cached, the library computes n - p tokens.
    shared = kernels.mixed_step_breakdown(prefill or 1, point.decodes - (prefill == 0), max(prefill, 1), 2)[1]
    context = decode = 0.0
    if prefill:
        length = point.chunk + point.before
        context = kernels.mixed_step_breakdown(point.chunks * length, 0, length, 2, point.before)[2]
    if point.decodes:
        # NOTE: the library places decodes in the middle of the output: with 2 tokens, one token after the prompt.
        decode = kernels.mixed_step_breakdown(1, point.decodes, max(point.context - 1, 1), 2)[3]
    return HOST_S + (shared + context + decode) / 1000


def points(count: int, kv_tokens: int, seed: int) -> list[Point]:
    """Return distinct random steps, ``count`` each of decode only, prefill only and both, with log-uniform sizes.

    Batches have 1 to 256 sequences with mean contexts of 32 to 8192 tokens that fit the KV cache. A step has at most
    2048 tokens. Chunks have at least 8 tokens; half of them are first chunks. A third of the steps have several chunks.
    """
    random = np.random.default_rng(seed)

    def log_uniform(low: float, high: float) -> int:
        return round(float(np.exp(random.uniform(np.log(low), np.log(max(high, low))))))

    def decodes(max_batch: int) -> dict[str, int]:
        batch = log_uniform(1, max_batch)
        return {"decodes": batch, "context": log_uniform(32, min(MAX_MODEL_LEN, kv_tokens / batch))}

    def prefill(max_tokens: int) -> dict[str, int]:
        tokens = log_uniform(8, max_tokens)
        chunks = min(log_uniform(2, 16), max(tokens // 8, 1)) if random.random() < 1 / 3 else 1
        chunk = tokens // chunks
        before = 0 if random.random() < 0.5 else log_uniform(16, MAX_MODEL_LEN - chunk)
        return {"chunks": chunks, "chunk": chunk, "before": before}

    def draw(decoding: bool, prefilling: bool) -> Point:
        batch = decodes(MAX_NUM_SEQS) if decoding else {}
        return Point(**batch, **(prefill(MAX_NUM_BATCHED_TOKENS - batch.get("decodes", 0)) if prefilling else {}))

    drawn: set[Point] = set()
    for number, kind in enumerate(((True, False), (False, True), (True, True)), start=1):
        while len(drawn) < number * count:
            drawn.add(draw(*kind))
    return sorted(drawn, key=lambda p: (p.decodes, p.context, p.chunks, p.chunk, p.before))


def time_steps(kernels: KernelTimings, at: list[Point], progress: Callable[[], None] = lambda: None) -> Steps:
    """Return the timed steps ``at`` these points. ``progress`` is called after each step."""
    rows = []
    for p in at:
        tokens, before = p.chunks * p.chunk, p.chunks * p.before
        rows.append((p.decodes, p.decodes * p.context, tokens, before, p.chunks, step_seconds(kernels, p)))
        progress()
    return Steps.of(rows)


def known_choices() -> tuple[list[str], list[str]]:
    """Return the models and systems that have kernel timings.

    Raises:
        ImportError: `aiconfigurator-core` is not installed.
    """
    from aiconfigurator_core.sdk.common import DefaultHFModels
    from aiconfigurator_core.sdk.perf_database import get_supported_databases

    systems = [system for system, backends in get_supported_databases().items() if backends.get("vllm")]
    return sorted({*DefaultHFModels, *STAND_INS}), sorted(systems)


def profile_from_aiconfigurator(
    model: str,
    system: str,
    name: str,
    *,
    tp: int = 1,
    backend_version: str | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Profile, Steps]:
    """Time `STEPS_PER_KIND` steps of each kind, fit a profile to 70% of them, and return it with the held-out steps.

    Args:
        model: one of `known_choices`, or a folder with a ``config.json``.
        system: the hardware, such as ``a100_sxm``.
        name: name of the profile.
        tp: tensor parallelism, in GPUs.
        backend_version: version of vLLM in the kernel timings; None selects the library's current version.
        seed: seed of the operating points and of the split.
        progress: called after each step.

    Returns:
        The profile, with its quality on the held-out steps, and those steps.

    Raises:
        ValueError: an unknown model, system or version; the message lists the known ones.
        ImportError: `aiconfigurator-core` is not installed.
    """
    from aiconfigurator_core.sdk import perf_database
    from aiconfigurator_core.sdk.engine import EngineHandle

    models, systems = known_choices()
    if system not in systems:
        raise ValueError(f"no timings of vLLM on {system!r}; choose one of {', '.join(systems)}")
    if model not in models and not (Path(model) / "config.json").is_file():
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(models)}, or a folder with a config.json")
    versions = perf_database.get_version_slots(system, "vllm") or {}
    version = backend_version or versions.get("current")
    database = perf_database.get_database(system, "vllm", version) if version in versions.values() else None
    if database is None:
        raise ValueError(f"no timings of vLLM {version} on {system}; choose one of {', '.join(versions.values())}")
    with _folder(model) as path:
        kernels = EngineHandle.compile(path, system, "vllm", backend_version=version, tp_size=tp)
        kv_tokens, kv_formula = _kv_tokens(path, tp, float(database.system_spec["gpu"]["mem_capacity"]))
    steps = time_steps(kernels, points(STEPS_PER_KIND, kv_tokens, seed), progress)
    fitted, held_out = split(steps, HELD_OUT, seed)
    stand_in = {"stand_in": STAND_INS[model]} if model in STAND_INS else {}
    command = f"antares profile --from-aiconfigurator {model} {system} --tp {tp} --backend-version {version}"
    profile = Profile(
        name=name,
        description=f"{model} on {tp} x {system} with vLLM {version}, from kernel timings, not measured on an engine"
        + ("; Llama layers of the same dimensions replace its own." if stand_in else "."),
        provenance={
            "source": f"aiconfigurator-core {metadata.version('aiconfigurator-core')} (NVIDIA), kernel timings of vLLM "
            f"{version} on {system}, tensor parallelism {tp}, plus {HOST_S * 1000:g} ms of host time per step",
            "command": f"{command} --name {name} --seed {seed}",
            "method": f"{len(fitted)} random steps fitted by non-negative least squares, {len(held_out)} held out",
            **stand_in,
            "kv_tokens": kv_formula,
            "date": datetime.date.today().isoformat(),
            "units": "seconds and tokens",
            "licence": "timings: Apache-2.0, NVIDIA; this fit: Apache-2.0",
        },
        regimes=fit_regimes(fitted),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        kv_tokens=kv_tokens,
    )
    return profile.with_quality(quality(profile, held_out)), held_out


@contextmanager
def _folder(model: str) -> Iterator[str]:
    """Yield ``model``, or a temporary folder with the config.json of its stand-in."""
    if model not in STAND_INS:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
        (Path(folder) / "config.json").write_text(json.dumps(config | STAND_INS[model]))
        yield folder


def _kv_tokens(model: str, tp: int, card_bytes: float) -> tuple[int, str]:
    """Return the KV cache size of one GPU (tokens), and a description of the calculation."""
    from aiconfigurator_core.sdk.memory import NaiveKVCacheEstimator

    shard = NaiveKVCacheEstimator.from_model_path(model, tp_size=tp, pp_size=1, allow_hf_config_download=False)
    weights, per_token = shard.weight_bytes(), shard.kv_bytes_per_token()
    if not weights or not per_token:
        raise ValueError(f"{model}: cannot derive the size of weights and KV cache from its configuration")
    gib = 2**30
    tokens = int((0.9 * card_bytes - weights - 3 * gib) // per_token)
    if tokens <= 0:
        raise ValueError(f"the model does not fit on {tp} GPUs of {card_bytes / gib:.0f} GiB: raise --tp")
    return tokens, (
        f"per GPU: (0.9 * {card_bytes / gib:.0f} GiB - {weights / gib:.1f} GiB of weights - 3 GiB of activations and "
        f"graphs) / {per_token / 1024:g} KiB per token"
    )
