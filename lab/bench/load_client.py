"""An open-loop load client: it sends each request at its due time, without waiting for answers, and measures latency.

It runs in its own process, so that it does not share an event loop with the command. It reports its own lateness, so
that a slow client is not mistaken for a slow server.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import aiohttp
import numpy as np
import orjson

from lab.bench.client_request import ClientResult, send_request
from lab.records.run_record import RequestResult, quantile
from lab.workload import WorkloadRequest
from lab.workload.sessions import BLOCK_TOKENS

OnProgress = Callable[[int, int], None]
"""Called with the number of requests sent and the number of requests that have ended."""

_PROGRESS_INTERVAL_S = 0.2
"""Interval between progress reports (s)."""

_MAX_LINE_BYTES = 1 << 30
"""Maximum length of one line from the client process (bytes); all results are one line."""

_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
"""Words that are one token each, with the space before them, in the byte-pair encodings of current models."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test, and the form of the requests.

    Attributes:
        url: base URL of the server, without ``/v1``.
        model: name of the model.
        endpoint: ``completions`` or ``chat``.
        prompt_style: ``ids`` (token ids of the exact length; completions only) or ``words`` (text of about that many
            tokens).
        ignore_eos: ask for exactly the workload's output lengths (an extension of vLLM).
        api_key: sent as a bearer token.
        timeout_s: maximum time for one answer (s).
        max_connections: 0 is unlimited. With a limit, waiting for a free connection counts as lateness and as latency.
        temperature: None leaves the default to the server.
    """

    url: str
    model: str
    endpoint: str = "completions"
    prompt_style: str = "ids"
    ignore_eos: bool = True
    api_key: str | None = None
    timeout_s: float = 600.0
    max_connections: int = 0
    temperature: float | None = None

    @property
    def path(self) -> str:
        """URL path of the endpoint."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def headers(self) -> dict[str, str]:
        """Return the headers of every request."""
        key = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return {"content-type": "application/json", **key}

    def body(self, request: WorkloadRequest, random: np.random.Generator) -> bytes:
        """Return the body for ``request``.

        Prompts with equal leading `WorkloadRequest.blocks` begin with the same tokens. The prompt of a request without
        blocks is random, so that a prefix cache has no effect. The answers in the history of a session are random too,
        not those of the server.
        """
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.endpoint == "chat":
            words = _content(request, random, 0, len(_WORDS))
            sizes = request.messages if sum(request.messages) == request.prompt_tokens else (request.prompt_tokens,)
            fields["messages"] = _messages(words, sizes)
        elif self.prompt_style == "ids":
            fields["prompt"] = _content(request, random, 100, 4000)
        else:
            fields["prompt"] = _text(_content(request, random, 0, len(_WORDS)))
        return orjson.dumps(fields)


def _text(words: list[int]) -> str:
    return " ".join([_WORDS[i] for i in words])


def _messages(words: list[int], sizes: Sequence[int]) -> list[dict[str, str]]:
    """Return chat messages of ``sizes`` words: one of the user, or a system prompt and then user and assistant."""
    roles = ["user"] if len(sizes) == 1 else ["system", *(("user", "assistant") * len(sizes))]
    messages, start = [], 0
    for role, size in zip(roles, sizes, strict=False):
        messages.append({"role": role, "content": _text(words[start : start + size])})
        start += size
    return messages


def _content(request: WorkloadRequest, random: np.random.Generator, low: int, high: int) -> list[int]:
    """Return a number in [low, high) for each token of the prompt, random or determined by the request's blocks."""
    tokens = request.prompt_tokens
    if not request.blocks:
        drawn: list[int] = random.integers(low, high, tokens).tolist()
        return drawn
    blocks = np.array(request.blocks[: -(-tokens // BLOCK_TOKENS)], dtype=np.uint64)
    # SplitMix64 of the block's hash and the token's place in the block.
    x = blocks[:, None] + np.arange(1, BLOCK_TOKENS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    numbers: list[int] = (low + x.ravel()[:tokens] % np.uint64(high - low)).tolist()
    return numbers


@dataclass(slots=True)
class LoadResult:
    """Answers of one workload.

    Attributes:
        answers: one per request, in the order of ``workload``.
        duration_s: seconds from the start to the last answer.
    """

    target: Target
    workload: Sequence[WorkloadRequest]
    answers: list[ClientResult]
    duration_s: float

    def results(self) -> list[RequestResult]:
        """Return the answers in the form that `lab.records.run_record.run_record` accepts."""
        return [
            RequestResult(request, a.outcome, a.ttft_s, a.tpot_s, a.e2e_s, a.late_s, a.reason)
            for request, a in zip(self.workload, self.answers, strict=True)
        ]

    def extras(self) -> dict[str, Any]:
        """Return the members of the run record that only a load client knows.

        - ``client_lateness_p99_s``: 99th percentile of the client's lateness (s).
        - ``output_tokens``: total over finished answers.
        - ``lengths_from_usage``: share of finished answers whose length is from the server's ``usage``.
        - ``hit_rate``: share of the prompt tokens that the server took from its prefix cache, by its ``usage``; None if
          it does not say.
        - ``short_answers``: share of finished answers shorter than requested, if exact lengths were requested.
        - ``reasons``: number of rejected and failed requests by reason, the ten most frequent.
        """
        pairs = zip(self.workload, self.answers, strict=True)
        finished = [(request, a) for request, a in pairs if a.outcome == "finished"]
        short = sum(a.tokens < request.output_tokens for request, a in finished) if self.target.ignore_eos else 0
        cached = sum(a.cached_tokens for a in self.answers)
        reasons: dict[str, int] = {}
        for answer in self.answers:
            if answer.reason:
                reasons[answer.reason] = reasons.get(answer.reason, 0) + 1
        return {
            "client_lateness_p99_s": quantile([a.late_s for a in self.answers], 0.99),
            "output_tokens": sum(a.tokens for _, a in finished),
            "lengths_from_usage": round(sum(a.from_usage for _, a in finished) / max(len(finished), 1), 4),
            "hit_rate": round(cached / sum(a.prompt_tokens for a in self.answers), 4) if cached else None,
            "short_answers": round(short / max(len(finished), 1), 4),
            "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])[:10]),
        }


async def send(
    target: Target, workload: Sequence[WorkloadRequest], seed: int, on_progress: OnProgress | None = None
) -> LoadResult:
    """Send ``workload`` from this process and wait for every answer. ``seed`` determines the content of the prompts."""
    random = np.random.default_rng(seed)
    bodies = [target.body(request, random) for request in workload]
    answers = [ClientResult() for _ in workload]
    slots = asyncio.Semaphore(target.max_connections) if target.max_connections else contextlib.nullcontext()
    sent = done = 0

    async def send_one(index: int, due: float) -> None:
        nonlocal done
        async with slots:
            await send_request(
                session,
                target.path,
                workload[index],
                bodies[index],
                due,
                answers[index],
                exact_length=target.ignore_eos,
            )
        done += 1

    async def report() -> None:
        while on_progress is not None:
            on_progress(sent, done)
            await asyncio.sleep(_PROGRESS_INTERVAL_S)

    timeout = aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=min(30.0, target.timeout_s))
    connector = aiohttp.TCPConnector(limit=0)
    gc.freeze()  # The bodies live until the end of the run; exclude them from garbage collection.
    async with aiohttp.ClientSession(
        target.url, connector=connector, timeout=timeout, headers=target.headers(), read_bufsize=1 << 20
    ) as session:
        reporting = asyncio.create_task(report())
        started = time.monotonic() + 0.05
        tasks = []
        for index, request in enumerate(workload):
            due = started + request.at_s
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(send_one(index, due)))
            sent += 1
            if wait_s <= 0:
                # The client is late: let the new task send its request before the next one is created.
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        duration_s = time.monotonic() - started
        reporting.cancel()
    if on_progress is not None:
        on_progress(sent, done)
    return LoadResult(target, workload, answers, duration_s)


async def send_from_another_process(
    target: Target, workload: Sequence[WorkloadRequest], seed: int, on_progress: OnProgress | None = None
) -> LoadResult:
    """Run `send` in a separate process.

    Raises:
        RuntimeError: the process failed.
    """
    job = {"target": asdict(target), "workload": [astuple(request) for request in workload], "seed": seed}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "lab.bench.load_client",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_MAX_LINE_BYTES,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    last: dict[str, Any] = {}
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(orjson.dumps(job))
            await process.stdin.drain()
            process.stdin.close()
        async for line in process.stdout:
            last = orjson.loads(line)
            if on_progress is not None and "sent" in last:
                on_progress(last["sent"], last["done"])
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode or "answers" not in last:
        raise RuntimeError(f"the load client exited with code {process.returncode}")
    return LoadResult(target, workload, [ClientResult(*row) for row in last["answers"]], last["duration_s"])


def main() -> None:
    """Read a job from stdin; write progress and then the results to stdout, one JSON object per line."""
    job = orjson.loads(sys.stdin.buffer.read())
    # NOTE: JSON has no infinity; the parent writes a missing bound as null.
    workload = [WorkloadRequest(*map(_decoded, row)) for row in job["workload"]]

    def write(message: dict[str, Any]) -> None:
        sys.stdout.buffer.write(orjson.dumps(message) + b"\n")
        sys.stdout.buffer.flush()

    _raise_file_limit()
    sending = send(
        Target(**job["target"]), workload, job["seed"], lambda sent, done: write({"sent": sent, "done": done})
    )
    if sys.platform == "win32":
        result = asyncio.run(sending)
    else:
        import uvloop

        result = uvloop.run(sending)
    write({"answers": [astuple(answer) for answer in result.answers], "duration_s": result.duration_s})


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return math.inf if value is None else value


def _raise_file_limit() -> None:
    """Raise the limit on open files to its hard limit: every connection needs one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
