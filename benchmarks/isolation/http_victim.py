"""The victim of the isolation study over HTTP: a tenant that offers a quarter of what the engine holds."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field

import httpx

PER_S = 8.0
"""Requests per second. Every fourth one is a call to ``/v1/embeddings``, which is not scheduled."""

TOKENS = 40
TTFT_S, TPOT_S, EMBEDDING_S = 1.0, 0.1, 2.0
"""What counts as attained: the bounds of the class, and for embeddings the whole time."""

PADDING = "x" * (100 << 10)
"""Makes every second body so large that it counts as body memory."""


@dataclass(slots=True)
class Victim:
    """What the victim saw. ``ends``: number of requests by end. ``ttft_s``: of the chats that were served."""

    attained: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """How many requests ended."""
        return sum(self.ends.values())

    @property
    def adherence(self) -> float:
        """Attained requests by all, 0 to 1."""
        return self.attained / max(1, self.requests)

    def ended(self, end: str, attained: bool) -> None:
        """Count a request."""
        self.ends[end] = self.ends.get(end, 0) + 1
        self.attained += attained


async def run_victim(url: str, key: str, seconds: float, seed: int, warm_s: float = 0.0) -> Victim:
    """Send requests for ``seconds``, each on a connection of its own, and return how they ended.

    ``warm_s``: seconds before these, in which it sends requests that do not count.
    """
    victim, warm, jitter = Victim(), Victim(), random.Random(seed)
    headers = {"authorization": f"Bearer {key}", "connection": "close"}
    async with (
        httpx.AsyncClient(base_url=url, timeout=20, trust_env=False, headers=headers, verify=False) as http,
        asyncio.TaskGroup() as group,
    ):
        started = time.monotonic()
        for number in range(round((warm_s + seconds) * PER_S)):
            await asyncio.sleep(max(0.0, started + (number + jitter.random()) / PER_S - time.monotonic()))
            counted = victim if number >= warm_s * PER_S else warm
            ask = _embed if number % 4 == 3 else _chat
            group.create_task(_ask(counted, ask(http, counted, PADDING if number % 2 else "")))
    return victim


async def _ask(victim: Victim, request: Coroutine[None, None, None]) -> None:
    try:
        await request
    except httpx.HTTPError as error:
        victim.ended(type(error).__name__, False)


async def _chat(http: httpx.AsyncClient, victim: Victim, padding: str) -> None:
    body = {
        "model": "simulated", "messages": [{"role": "user", "content": "tell me a story"}], "stream": True,
        "max_tokens": TOKENS, "ignore_eos": True, "unused": padding,
    }  # fmt: skip
    started = time.monotonic()
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        first_s, last_s, tokens, end = 0.0, 0.0, 0, str(answer.status_code)
        async for line in answer.aiter_lines():
            if '"content"' in line and answer.status_code == 200:
                tokens, last_s = tokens + 1, time.monotonic() - started
                first_s = first_s or last_s
            if line.startswith('data: {"error"'):
                end = "error event"
            if answer.status_code != 200 and line:
                end += " " + json.loads(line)["error"]["code"]
    if tokens and end == "200":
        victim.ttft_s.append(first_s)
    tpot_s = (last_s - first_s) / max(1, tokens - 1)
    victim.ended(end, end == "200" and tokens >= TOKENS and first_s <= TTFT_S and tpot_s <= TPOT_S)


async def _embed(http: httpx.AsyncClient, victim: Victim, padding: str) -> None:
    started = time.monotonic()
    answer = await http.post("/v1/embeddings", json={"input": "x", "unused": padding})
    in_time = time.monotonic() - started <= EMBEDDING_S
    victim.ended(str(answer.status_code), answer.status_code == 200 and in_time)
