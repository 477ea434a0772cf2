"""An open-loop load client: sends when the workload says, never waiting for answers, and measures at its own end.

Runs as its own process, so that it does not share an event loop with what it measures. It reports its own lateness: a
slow client must not pass for a slow server.
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

from lab.bench.load_answer import ClientResult, ask
from lab.records.run_record import RequestResult, quantile
from lab.workload import WorkloadRequest

OnProgress = Callable[[int, int], None]
"""Called with the requests sent and those that are over."""

_PROGRESS_EVERY_S = 0.2
_LONGEST_LINE = 1 << 30
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
"""Each is one token, with the space before it, in the byte-pair encodings of current models."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to ask.

    ``url`` is the server's, without ``/v1``. ``endpoint`` is ``completions`` or ``chat``. ``prompt_style`` is ``ids``
    (exactly so many token ids; completions only) or ``words`` (text of about so many tokens). ``ignore_eos`` asks for
    exactly the workload's output lengths (vLLM's extension). ``timeout_s`` is the most that one answer may take.
    ``max_connections`` 0 is no limit; with one, waiting for a free connection counts as lateness and as latency.
    ``temperature``: None leaves it to the server.
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
        """The route to post to."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def headers(self) -> dict[str, str]:
        """What every request carries."""
        key = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return {"content-type": "application/json", **key}

    def body(self, asked: WorkloadRequest, random: np.random.Generator) -> bytes:
        """A request of the asked size, its content at random so that no prefix cache helps."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": asked.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": self._text(asked.prompt_tokens, random)}]
        elif self.prompt_style == "ids":
            fields["prompt"] = random.integers(100, 4000, asked.prompt_tokens).tolist()
        else:
            fields["prompt"] = self._text(asked.prompt_tokens, random)
        return orjson.dumps(fields)

    @staticmethod
    def _text(tokens: int, random: np.random.Generator) -> str:
        return " ".join(_WORDS[i] for i in random.integers(0, len(_WORDS), tokens).tolist())


@dataclass(slots=True)
class Sent:
    """A workload's answers, in its order, and the seconds from the start to the last of them."""

    target: Target
    workload: Sequence[WorkloadRequest]
    answers: list[ClientResult]
    duration_s: float

    def served(self) -> list[RequestResult]:
        """The answers as `lab.records.run_record.run_record` takes them."""
        return [
            RequestResult(asked, a.outcome, a.ttft_s, a.tpot_s, a.e2e_s, a.late_s, a.reason)
            for asked, a in zip(self.workload, self.answers, strict=True)
        ]

    def extras(self) -> dict[str, Any]:
        """What only a load client knows, for the run's record.

        ``client_lateness_p99_s``; ``output_tokens`` in all finished answers; the shares of finished answers whose
        length the server stated (``lengths_from_usage``) and, where exact lengths were asked for, that fell short
        (``short_answers``); why requests were refused or failed, by number (``reasons``).
        """
        finished = [(q, a) for q, a in zip(self.workload, self.answers, strict=True) if a.outcome == "finished"]
        short = sum(a.tokens < q.output_tokens for q, a in finished) if self.target.ignore_eos else 0
        reasons: dict[str, int] = {}
        for answer in self.answers:
            if answer.reason:
                reasons[answer.reason] = reasons.get(answer.reason, 0) + 1
        return {
            "client_lateness_p99_s": quantile([a.late_s for a in self.answers], 0.99),
            "output_tokens": sum(a.tokens for _, a in finished),
            "lengths_from_usage": round(sum(a.from_usage for _, a in finished) / max(len(finished), 1), 4),
            "short_answers": round(short / max(len(finished), 1), 4),
            "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])[:10]),
        }


async def send(
    target: Target, workload: Sequence[WorkloadRequest], seed: int, on_progress: OnProgress | None = None
) -> Sent:
    """Send ``workload`` from this process and wait for every answer; ``seed`` decides the prompts' content."""
    random = np.random.default_rng(seed)
    bodies = [target.body(asked, random) for asked in workload]
    answers = [ClientResult() for _ in workload]
    slots = asyncio.Semaphore(target.max_connections) if target.max_connections else contextlib.nullcontext()
    sent = done = 0

    async def one(which: int, due: float) -> None:
        nonlocal done
        async with slots:
            await ask(
                session,
                target.path,
                workload[which],
                bodies[which],
                due,
                answers[which],
                exact_length=target.ignore_eos,
            )
        done += 1

    async def report() -> None:
        while on_progress is not None:
            on_progress(sent, done)
            await asyncio.sleep(_PROGRESS_EVERY_S)

    timeout = aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=min(30.0, target.timeout_s))
    connector = aiohttp.TCPConnector(limit=0)
    gc.freeze()  # The bodies will not become garbage; do not look at them again.
    async with aiohttp.ClientSession(
        target.url, connector=connector, timeout=timeout, headers=target.headers(), read_bufsize=1 << 20
    ) as session:
        reporting = asyncio.create_task(report())
        started = time.monotonic() + 0.05
        tasks = []
        for which, asked in enumerate(workload):
            due = started + asked.at_s
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            tasks.append(asyncio.create_task(one(which, due)))
            sent += 1
            if early <= 0:
                # Behind: let what was sent go out before the next.
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        duration_s = time.monotonic() - started
        reporting.cancel()
    if on_progress is not None:
        on_progress(sent, done)
    return Sent(target, workload, answers, duration_s)


async def send_from_another_process(
    target: Target, workload: Sequence[WorkloadRequest], seed: int, on_progress: OnProgress | None = None
) -> Sent:
    """`send`, in a process of its own. Raises `RuntimeError` when that process fails."""
    job = {"target": asdict(target), "workload": [astuple(asked) for asked in workload], "seed": seed}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "lab.bench.load_client",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
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
        raise RuntimeError(f"the load client ended with code {process.returncode}")
    return Sent(target, workload, [ClientResult(*row) for row in last["answers"]], last["duration_s"])


def main() -> None:
    """Read a job from standard input; write progress and then the answers to standard output, a JSON object a line."""
    job = orjson.loads(sys.stdin.buffer.read())
    # JSON has no infinity: a bound that is none.
    workload = [WorkloadRequest(*map(_or_infinite, row)) for row in job["workload"]]

    def put(found: dict[str, Any]) -> None:
        sys.stdout.buffer.write(orjson.dumps(found) + b"\n")
        sys.stdout.buffer.flush()

    _allow_many_connections()
    job_done = send(
        Target(**job["target"]), workload, job["seed"], lambda sent, done: put({"sent": sent, "done": done})
    )
    if sys.platform == "win32":
        sent = asyncio.run(job_done)
    else:
        import uvloop

        sent = uvloop.run(job_done)
    put({"answers": [astuple(answer) for answer in sent.answers], "duration_s": sent.duration_s})


def _or_infinite(value: Any) -> Any:
    return math.inf if value is None else value


def _allow_many_connections() -> None:
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
