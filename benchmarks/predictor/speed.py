"""Measures the speed of the length predictor on this machine, and of a TF-IDF + ridge pipeline (scikit-learn).

    python -m benchmarks.predictor.speed [--seconds 20] [--seed 0] [--json]        (extras bench and train)

Three measurements run one after another, on held-out ShareGPT prompts:

1. Predictions/s of the shipped model on one core, from text to quantiles, in batches of 64 and one at a time.
2. The same for `TfidfVectorizer` (words and pairs) + `Ridge` on log length, fitted to 2,000 other prompts.
3. HTTP latency of `antares predictor serve` in its own process, with one prompt per call and 200 calls/s, open loop.
   Each call is sent when it is due, whether or not earlier ones have finished, and is timed from then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.command import AsJson, print_results

BATCH = 64
_FITTED_PROMPTS, _TIMED_PROMPTS = 2000, 1024


def main(
    seconds: Annotated[float, typer.Option(help="Duration of the HTTP load.")] = 20.0,
    qps: Annotated[float, typer.Option(help="Rate of the HTTP load, 1/s.")] = 200.0,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and arrivals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure the speed of the shipped length predictor."""
    print_results(measure(seconds, qps, seed), as_json, _table)


def measure(seconds: float, qps: float, seed: int) -> dict[str, Any]:
    """Run all three measurements; see the module."""
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[threads] = "1"
    prompts, fitted, lengths = _prompts(seed)
    with _one_core():
        rows = {
            "antares": _throughput(_shipped(), prompts),
            "tfidf_ridge": _throughput(_tfidf(fitted, lengths), prompts),
        }
    with _running_service() as url:
        http = asyncio.run(_http_latency(url, prompts, seconds, qps, seed))
    return {"seed": seed, "prompts": len(prompts), "batch": BATCH, "one_core": rows, "http": http}


def _prompts(seed: int) -> tuple[list[str], list[str], list[float]]:
    """Return held-out prompts, other prompts to fit the pipeline to, and the output lengths of the latter."""
    from predictor_service.model.length_model import load_model
    from predictor_service.training.datasets import read_dataset

    data = read_dataset(int(load_model().card["seed"]), lambda stage, share: None)
    random = np.random.default_rng(seed)
    test, train = (
        random.permutation(data.split.test)[:_TIMED_PROMPTS],
        random.permutation(data.split.train)[:_FITTED_PROMPTS],
    )
    return (
        [data.turns[row].prompt for row in test],
        [data.turns[row].prompt for row in train],
        [float(data.turns[row].length) for row in train],
    )


def _shipped() -> Callable[[list[str]], object]:
    from predictor_service.model.features import prompt_features
    from predictor_service.model.length_model import load_model

    model = load_model()
    return lambda prompts: model.predict([prompt_features(prompt) for prompt in prompts])


def _tfidf(prompts: list[str], lengths: list[float]) -> Callable[[list[str]], object]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), Ridge(alpha=3.0))
    pipeline.fit(prompts, np.log1p(lengths))
    predict: Callable[[list[str]], object] = pipeline.predict
    return predict


def _throughput(predict: Callable[[list[str]], object], prompts: list[str]) -> dict[str, float]:
    """Return predictions per second of wall time and of CPU time in batches, and latencies (ms) of single predictions.

    The two rates differ by the time that other processes take on the core.
    """
    predict(prompts[:BATCH])
    started, cpu_started = time.perf_counter(), time.process_time()
    for first in range(0, len(prompts), BATCH):
        predict(prompts[first : first + BATCH])
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    single = []
    for prompt in prompts:
        started = time.perf_counter()
        predict([prompt])
        single.append((time.perf_counter() - started) * 1e3)
    return {
        "batched_per_s": round(len(prompts) / wall_s, 1),
        "batched_per_cpu_s": round(len(prompts) / cpu_s, 1),
        "single_p50_ms": round(float(np.percentile(single, 50)), 3),
        "single_p99_ms": round(float(np.percentile(single, 99)), 3),
    }


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Pin this process to one core, if the system supports it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def _running_service() -> Iterator[str]:
    """Run `antares predictor serve` in its own process and yield its URL."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "predictor_service.cli", "serve", "--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/health", trust_env=False)
                break
            if time.monotonic() > until:
                raise RuntimeError("the predictor did not start within 30 s")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


async def _http_latency(url: str, prompts: list[str], seconds: float, qps: float, seed: int) -> dict[str, float]:
    """Send Poisson arrivals at ``qps`` and return percentiles of milliseconds from due time to response."""
    import aiohttp

    random = np.random.default_rng(seed)
    due = np.cumsum(random.exponential(1 / qps, int(seconds * qps)))
    latencies_ms: list[float] = []
    failed = 0
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(prompt: str, at: float) -> None:
            nonlocal failed
            async with session.post("/v1/predict", json={"inputs": [{"prompt": prompt}]}) as response:
                await response.read()
                failed += response.status != 200
            latencies_ms.append((time.perf_counter() - at) * 1e3)

        await asyncio.gather(*(call(prompt, time.perf_counter()) for prompt in prompts[:32]))
        latencies_ms.clear()
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for n, at in enumerate(due.tolist()):
                await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
                group.create_task(call(prompts[n % len(prompts)], started + at))
    return {
        "qps": qps,
        "calls": len(latencies_ms),
        "failed": failed,
        "p50_ms": round(float(np.percentile(latencies_ms, 50)), 2),
        "p90_ms": round(float(np.percentile(latencies_ms, 90)), 2),
        "p99_ms": round(float(np.percentile(latencies_ms, 99)), 2),
    }


def _table(results: dict[str, Any]) -> str:
    titles = {
        "batched_per_s": "batched/s",
        "batched_per_cpu_s": "per CPU s",
        "single_p50_ms": "single p50 ms",
        "single_p99_ms": "single p99 ms",
    }
    lines = [f"{'one core':14}" + "".join(f"{title:>14}" for title in titles.values())]
    for name, row in results["one_core"].items():
        lines.append(f"{name:14}" + "".join(f"{row[key]:14.2f}" for key in titles))
    http = results["http"]
    lines.append(
        f"HTTP at {http['qps']:.0f}/s: p50 {http['p50_ms']} ms, p90 {http['p90_ms']} ms, p99 {http['p99_ms']} ms, "
        f"{http['failed']} of {http['calls']} failed"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
