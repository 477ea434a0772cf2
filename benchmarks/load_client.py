"""An open-loop load client: sends when the workload says, never waiting for answers, and measures at its own end.

Runs as its own process, so that it does not share an event loop with what it measures. It reports its own lateness: a
slow client must not pass for a slow server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import numpy as np

from benchmarks.workload import Asked


@dataclass(slots=True)
class Measured:
    """One request's fate. Times in seconds from the moment it was due; ``status`` is HTTP's, 0 without one."""

    category: int
    status: int = 0
    ttft_s: float | None = None
    tpot_s: float = 0.0
    finished: bool = False
    late_s: float = 0.0
    attained: bool = False
    ttft_violated: bool = False
    tpot_violated: bool = False


async def run(base_url: str, model: str, workload: list[Asked], seed: int) -> dict[str, Any]:
    """Send ``workload`` to ``base_url`` and return the run's figures (rates are fractions of all requests)."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(100, 4000, asked.prompt_tokens).tolist() for asked in workload]
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, connector=connector, timeout=timeout) as session:
        started = time.monotonic() + 0.05
        tasks = []
        for asked, prompt in zip(workload, prompts, strict=True):
            await asyncio.sleep(max(0.0, started + asked.at_s - time.monotonic()))
            tasks.append(asyncio.create_task(_one(session, model, asked, prompt, started + asked.at_s)))
        measured = await asyncio.gather(*tasks)
        return _figures(measured, time.monotonic() - started)


async def _one(session: aiohttp.ClientSession, model: str, asked: Asked, prompt: list[int], due: float) -> Measured:
    result = Measured(asked.category, late_s=time.monotonic() - due)
    body = {"model": model, "prompt": prompt, "max_tokens": asked.output_tokens, "ignore_eos": True, "stream": True}
    headers = {
        "x-slo-ttft-ms": f"{asked.ttft_slo_s * 1000:g}",
        "x-slo-tpot-ms": f"{asked.tpot_slo_s * 1000:g}",
    }
    first = last = None
    try:
        async with session.post("/v1/completions", json=body, headers=headers) as response:
            result.status = response.status
            async for line in response.content:
                if response.status == 200 and line.startswith(b"data: {"):
                    if line.startswith(b'data: {"error"'):
                        break
                    last = time.monotonic()
                    first = first or last
                elif line.startswith(b"data: [DONE]"):
                    result.finished = first is not None
    except aiohttp.ClientError:
        result.status = 0
    if first is not None and last is not None:
        result.ttft_s = first - due
        # Exactly as many tokens were generated as were asked for; not every token is an event.
        result.tpot_s = (last - first) / (asked.output_tokens - 1) if asked.output_tokens > 1 else 0.0
        result.ttft_violated = result.ttft_s > asked.ttft_slo_s
        result.tpot_violated = result.tpot_s > asked.tpot_slo_s
    result.attained = result.finished and not result.ttft_violated and not result.tpot_violated
    return result


def _figures(measured: list[Measured], duration_s: float) -> dict[str, Any]:
    n = len(measured)
    done = [m for m in measured if m.finished]
    ttft = [m.ttft_s for m in done if m.ttft_s is not None]
    tpot = [m.tpot_s for m in done]

    def quantile(values: list[float], q: float) -> float | None:
        return round(float(np.quantile(values, q)), 4) if values else None

    return {
        "requests": n,
        "duration_s": round(duration_s, 2),
        "goodput": round(sum(m.attained for m in measured) / duration_s, 3),
        "slo_adherence": round(sum(m.attained for m in measured) / n, 4),
        "finished": round(len(done) / n, 4),
        "rejected": round(sum(m.status == 429 for m in measured) / n, 4),
        "failed": round(sum(m.status != 429 and not m.finished for m in measured) / n, 4),
        "ttft_violations": round(sum(m.finished and m.ttft_violated for m in measured) / n, 4),
        "tpot_violations": round(sum(m.finished and m.tpot_violated for m in measured) / n, 4),
        "ttft_p50_s": quantile(ttft, 0.5),
        "ttft_p99_s": quantile(ttft, 0.99),
        "tpot_p50_s": quantile(tpot, 0.5),
        "tpot_p99_s": quantile(tpot, 0.99),
        "adherence_by_category": {
            str(c): round(float(np.mean([m.attained for m in measured if m.category == c])), 4)
            for c in sorted({m.category for m in measured})
        },
        "client_lateness_p99_s": quantile([m.late_s for m in measured], 0.99),
    }


async def send_from_another_process(base_url: str, model: str, workload: list[Asked], seed: int) -> dict[str, Any]:
    """`run`, in a process of its own."""
    job = {"base_url": base_url, "model": model, "workload": [asdict(asked) for asked in workload], "seed": seed}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.load_client",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate(json.dumps(job).encode())
    if process.returncode:
        raise RuntimeError(f"the load client ended with code {process.returncode}")
    found: dict[str, Any] = json.loads(out)
    return found


def main() -> None:
    """Read a job from standard input, write its figures to standard output."""
    job = json.load(sys.stdin)
    workload = [Asked(**asked) for asked in job["workload"]]
    json.dump(asyncio.run(run(job["base_url"], job["model"], workload, job["seed"])), sys.stdout)


if __name__ == "__main__":
    main()
