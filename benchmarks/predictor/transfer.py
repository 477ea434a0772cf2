"""Measures how the length predictor transfers to a model that it was not trained on: SmolLM2-135M-Instruct.

    python -m benchmarks.predictor.transfer generate --output answers.jsonl    (extras cpu and train; half an hour)
    python -m benchmarks.predictor.transfer keep --answers answers.jsonl       (extra train; features and lengths only)
    python -m benchmarks.predictor.transfer evaluate [--json]                  (base install; seconds)
    python -m benchmarks.predictor.transfer simulate [--json]                  (base install; a minute)

``generate`` sends the opening prompts of held-out ShareGPT conversations to the real engine. ``keep`` stores hashed
features of the prompts and lengths of the answers in `DATA_FILE`, without text. ``evaluate`` replays them through the
service's online calibration, in many random orders: it observes the first `FINISHED` answers and predicts the others.
``simulate`` does the same with the shipped model's held-out answers, whose lengths are transformed into those of other
models. Both also show the constant median, and two calibrations that were not chosen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.simulate.predictions import SHIPPED
from lab.workload.lengths import DATA
from predictor_service.calibration.corrections import survival_quantile
from predictor_service.calibration.online import FinishedAnswer, OnlineCalibration
from predictor_service.model.features import FEATURES_VERSION, Features, prompt_features
from predictor_service.model.length_model import MAX_TOKENS as MOST_TOKENS
from predictor_service.model.length_model import Prediction

DATA_FILE = DATA / "smollm2_answers.npz"
MODEL = "smollm2-135m-instruct"
PROMPTS, LONGEST_PROMPT_CHARS = 400, 4000
MAX_TOKENS, TEMPERATURE = 512, 0.7
FINISHED = 200
"""FinishedAnswer answers of the new model that the calibration has observed."""

_CONCURRENCY = 48

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Rows = NDArray[np.int64]
Raw = list[Prediction]


def held_out_prompts(seed: int) -> list[tuple[int, str]]:
    """Return (row of the dataset, prompt) of `PROMPTS` opening turns from the test part of the shipped model."""
    from predictor_service.model.length_model import load_model
    from predictor_service.training.datasets import read_dataset

    data = read_dataset(int(load_model().card["seed"]), lambda stage, share: None)
    rows = np.random.default_rng(seed).permutation(data.split.test).tolist()
    fitting = [(row, data.turns[row].prompt) for row in rows if len(data.turns[row].prompt) <= LONGEST_PROMPT_CHARS]
    return fitting[:PROMPTS]


async def generate(prompts: Sequence[tuple[int, str]], output: Path) -> None:
    """Send each (row, prompt) to the engine and append a line ``{"row", "tokens", "censored"}`` to ``output``.

    Zero tokens mean that the engine rejected the prompt.
    """
    import httpx

    from engine_adapter.build import BUILDERS
    from engine_adapter.engine import EngineEvents

    engine = BUILDERS["vllm"](
        name="local",
        model=f"builtin:{MODEL}",
        served_model_name=MODEL,
        flags={
            "max-model-len": 2048,
            "max-num-seqs": 64,
            "max-num-batched-tokens": 512,
            "enforce-eager": True,
            "dtype": "float32",
        },
        env={"VLLM_CPU_KVCACHE_SPACE": 2, "HF_HUB_OFFLINE": 1, "VLLM_LOGGING_LEVEL": "ERROR"},
        calibrate=False,
    )
    await engine.start(EngineEvents())
    slots = asyncio.Semaphore(_CONCURRENCY)
    done = 0
    try:
        transport = httpx.ASGITransport(engine.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client:
            with output.open("a") as out:

                async def answer(row: int, prompt: str) -> None:
                    nonlocal done
                    body = {
                        "model": MODEL,
                        "messages": [{"role": "user", "content": prompt}],
                        "max_tokens": MAX_TOKENS,
                        "temperature": TEMPERATURE,
                    }
                    async with slots:
                        response = await client.post("/v1/chat/completions", json=body)
                    document = response.json()
                    tokens, censored = 0, False  # the prompt is longer than the context of the model
                    if response.status_code == 200:
                        tokens = document["usage"]["completion_tokens"]
                        censored = document["choices"][0]["finish_reason"] == "length"
                    out.write(json.dumps({"row": row, "tokens": tokens, "censored": censored}) + "\n")
                    out.flush()
                    done += 1
                    sys.stderr.write(f"{done} of {len(prompts)}\n")

                async with asyncio.TaskGroup() as group:
                    for row, prompt in prompts:
                        group.create_task(answer(row, prompt))
    finally:
        await engine.stop()


def keep(answers: Path, target: Path = DATA_FILE, seed: int = 0) -> int:
    """Write ``target``, numbers only, from the lines of `generate`; return the number of rows."""
    lines = {line["row"]: line for line in _lines(answers)}
    # In an incomplete run the missing answers are the long ones. Stop at the first of them, to avoid that bias.
    answered = takewhile(lambda pair: pair[0] in lines, held_out_prompts(seed))
    rows = {row: prompt_features(prompt) for row, prompt in answered}
    kept = sorted(row for row in rows if lines[row]["tokens"])
    np.savez_compressed(
        target,
        features_version=np.array(FEATURES_VERSION),
        row=np.array(kept, dtype=np.int32),
        length=np.array([lines[row]["tokens"] for row in kept], dtype=np.int32),
        censored=np.array([lines[row]["censored"] for row in kept], dtype=np.bool_),
        # Differences compress better.
        steps=np.concatenate([np.diff(rows[row].indices, prepend=np.uint16(0)) for row in kept]),
        counts=np.concatenate([rows[row].counts for row in kept]),
        stored=np.array([len(rows[row].indices) for row in kept], dtype=np.int32),
        lexical=np.stack([rows[row].lexical for row in kept]),
    )
    return len(kept)


def _lines(answers: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answers.read_text().splitlines()]


def read_kept(source: Path = DATA_FILE) -> tuple[list[Features], NDArray[np.int32], NDArray[np.bool_]]:
    """Return features, lengths (tokens) and whether `MAX_TOKENS` truncated the answer, of each row of ``source``.

    Raises:
        ValueError: the file has another version of the features.
    """
    with np.load(source) as kept:
        if int(kept["features_version"]) != FEATURES_VERSION:
            raise ValueError(
                f"{source.name} holds features of version {int(kept['features_version'])}, not {FEATURES_VERSION}: "
                "write it again with  python -m benchmarks.predictor.transfer keep"
            )
        cuts = np.cumsum(kept["stored"])[:-1]
        indices = [np.cumsum(steps, dtype=np.uint16) for steps in np.split(kept["steps"], cuts)]
        counts = np.split(kept["counts"], cuts)
        features = [Features(*row) for row in zip(indices, counts, kept["lexical"], strict=True)]
        return features, kept["length"], kept["censored"]


Quantiles = tuple[Floats, Floats]
"""Point estimate and p90 of each row, in tokens."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Raw predictions of answers, their ``actual`` tokens, and whether ``limit`` truncated them (``censored``)."""

    raw: Raw
    actual: Floats
    censored: Flags
    limit: float


def evaluate(seed: int, finished: int = FINISHED, shuffles: int = 100) -> dict[str, Any]:
    """`replay` the answers of SmolLM2 in `DATA_FILE`."""
    from predictor_service.model.length_model import load_model
    from predictor_service.training.evaluate import kendall_tau

    features, lengths, censored = read_kept()
    raw = load_model().predict(features)
    actual = lengths.astype(np.float64)
    return {
        "model": MODEL,
        "answers": len(actual),
        "cut_off_share": round(float(censored.mean()), 4),
        "median_tokens": float(np.median(actual)),
        "kendall_tau_uncalibrated": round(kendall_tau(np.array([p.length for p in raw]), actual), 4),
        "finished": finished,
        "shuffles": shuffles,
        "seed": seed,
        "methods": replay(Answers(raw, actual, censored, MAX_TOKENS), seed, finished, shuffles),
    }


def simulate(seed: int, finished: int = FINISHED, shuffles: int = 30) -> dict[str, Any]:
    """`replay` the shipped model's held-out answers, with lengths transformed into those of other models."""
    with np.load(SHIPPED) as held_out:
        length, p50, p90 = (held_out[name].astype(np.float64) for name in ("length", "p50", "p90"))
    raw = [Prediction(middle, middle, upper) for middle, upper in zip(p50.tolist(), p90.tolist(), strict=True)]
    models = {
        "as they are": length,
        "0.3 times as long": np.maximum(0.3 * length, 1.0),
        "3 times, cut at 512": 3.0 * length,
        "8 length^0.6": 8.0 * length**0.6,
        "unrelated to the prompt": np.random.default_rng(seed).permutation(length),
    }
    results = {}
    for name, actual in models.items():
        limit = 512.0 if "cut" in name else float(MOST_TOKENS)
        answers = Answers(raw, np.minimum(actual, limit), actual >= limit, limit)
        results[name] = replay(answers, seed, finished, shuffles)
    return {"answers": len(raw), "finished": finished, "shuffles": shuffles, "seed": seed, "models": results}


def replay(answers: Answers, seed: int, finished: int, shuffles: int) -> dict[str, dict[str, float]]:
    """Observe ``finished`` answers and predict the others, in ``shuffles`` random orders; return means by method.

    Absolute errors are in tokens, against recorded lengths. Predictions are clamped to [1, limit], as in the service.
    """
    errors: dict[str, list[float]] = {name: [] for name in METHODS}
    covered: dict[str, list[float]] = {name: [] for name in METHODS}
    random, actual = np.random.default_rng(seed), answers.actual
    for _ in range(shuffles):
        order = random.permutation(len(actual))
        seen, rest = order[:finished], order[finished:]
        for name, method in METHODS.items():
            length, p90 = (np.clip(part[rest], 1.0, answers.limit) for part in method(answers, seen))
            errors[name].append(float(np.abs(length - actual[rest]).mean()))
            covered[name].append(float((p90 >= actual[rest]).mean()))
    return {
        name: {
            "mae_tokens": round(float(np.mean(errors[name])), 2),
            "coverage_p90": round(float(np.mean(covered[name])), 4),
            "beats_constant_share": round(float(np.mean(np.less(errors[name], errors["constant"]))), 3),
        }
        for name in METHODS
    }


def _uncalibrated(answers: Answers, seen: Rows) -> Quantiles:
    """Return the raw predictions."""
    return np.array([p.length for p in answers.raw]), np.array([p.p90 for p in answers.raw])


def _constant(answers: Answers, seen: Rows) -> Quantiles:
    """Return the median and the 90th percentile of the finished answers, for every row."""
    rows, actual = len(answers.raw), answers.actual[seen]
    return np.full(rows, np.median(actual)), np.full(rows, np.quantile(actual, 0.9))


def _calibrated(answers: Answers, seen: Rows) -> Quantiles:
    """Return the predictions of the service after it has observed the finished answers."""
    raw, actual, censored = answers.raw, answers.actual, answers.censored
    calibration = OnlineCalibration()
    calibration.observe(
        FinishedAnswer(MODEL, "", raw[i].p50, raw[i].p90, int(actual[i]), bool(censored[i])) for i in seen
    )
    calibration.refit()
    corrected = [calibration.correct(MODEL, "", prediction) for prediction in raw]
    return np.array([p.length for p in corrected]), np.array([p.p90 for p in corrected])


def _factors(answers: Answers, seen: Rows) -> Quantiles:
    """Correct p50 by one factor and p90 by another (not chosen)."""
    p50, p90 = np.array([p.p50 for p in answers.raw]), np.array([p.p90 for p in answers.raw])
    actual, complete, weight = answers.actual[seen], ~answers.censored[seen], np.ones(len(seen))
    middle = survival_quantile(actual / p50[seen], complete, weight, 0.5)
    upper = survival_quantile(actual / p90[seen], complete, weight, 0.9 * (len(seen) + 1) / len(seen))
    return p50 * middle, p90 * upper


def _grouped(answers: Answers, seen: Rows) -> Quantiles:
    """Interpolate Kaplan-Meier quantiles of eight groups of similar raw p50 (not chosen)."""
    score = np.array([p.p50 for p in answers.raw])
    knots, medians, uppers = [], [], []
    for group in np.array_split(seen[np.argsort(score[seen], kind="stable")], 8):
        actual, complete, weight = answers.actual[group], ~answers.censored[group], np.ones(len(group))
        knots.append(score[group].mean())
        medians.append(survival_quantile(actual, complete, weight, 0.5))
        uppers.append(survival_quantile(actual, complete, weight, min(0.9 * (len(group) + 1) / len(group), 1.0)))
    p50 = np.interp(score, knots, np.maximum.accumulate(medians))
    return p50, np.interp(score, knots, np.maximum.accumulate(uppers))


METHODS: dict[str, Callable[[Answers, Rows], Quantiles]] = {
    "uncalibrated": _uncalibrated,
    "constant": _constant,
    "calibrated": _calibrated,
    "two factors": _factors,
    "grouped": _grouped,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("generate", "keep", "evaluate", "simulate"):
        command = commands.add_parser(name)
        command.add_argument("--seed", type=int, default=0)
        if name == "generate":
            command.add_argument("--output", type=Path, required=True)
        elif name == "keep":
            command.add_argument("--answers", type=Path, required=True)
        else:
            command.add_argument("--json", action="store_true", dest="as_json")
            command.add_argument("--finished", type=int, default=FINISHED)
    options: Any = parser.parse_args(arguments)
    if options.command == "generate":
        known = {line["row"] for line in _lines(options.output)} if options.output.exists() else set()
        prompts = [(row, prompt) for row, prompt in held_out_prompts(options.seed) if row not in known]
        asyncio.run(generate(prompts, options.output))
    elif options.command == "keep":
        sys.stderr.write(f"{keep(options.answers, seed=options.seed)} answers written to {DATA_FILE.name}\n")
    else:
        results = (evaluate if options.command == "evaluate" else simulate)(options.seed, options.finished)
        sys.stdout.write(json.dumps(results, indent=2) + "\n" if options.as_json else _table(results))


def _table(results: dict[str, Any]) -> str:
    sizes = f"{results['answers']} answers, {results['finished']} finished, {results['shuffles']} shuffles"
    lines = [f"{sizes}, seed {results['seed']}"]
    if "methods" in results:
        lines.append(f"{MODEL}: median {results['median_tokens']:.0f} tokens, {results['cut_off_share']:.0%} cut off")
    for title, methods in results.get("models", {MODEL: results.get("methods", {})}).items():
        lines.append(f"{title:22}{'MAE tokens':>12}{'within p90':>12}{'beats constant':>16}")
        for name, row in methods.items():
            share = f"{row['beats_constant_share']:.0%}"
            lines.append(f"  {name:20}{row['mae_tokens']:12.1f}{row['coverage_p90']:12.3f}{share:>16}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
