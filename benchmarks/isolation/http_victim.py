"""The victim of the isolation study over HTTP: a tenant that offers a quarter of what the engine holds."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx

PER_S = 8.0
"""Requests per second. Every fourth one is a call to ``/v1/embeddings``, which is not scheduled."""

TOKENS = 40
TTFT_S, TPOT_S, EMBEDDING_S = 1.0, 0.1, 2.0
"""What counts as attained: the bounds of the class, and for embeddings the whole time."""

PADDING = "x" * (100 << 10)
"""Makes every second body so large that it counts as body memory."""


START_S = 3.0
"""Seconds of the abuse that `Victim.settled` leaves out. What the abuser got in first ends meanwhile."""

TIMEOUT_S = 20.0
"""Longest time (s) between two parts of an answer, after which the victim gives up."""


class Ended(NamedTuple):
    """How a request ended. ``sent_s``: after the start of the abuse. ``ttft_s``: of a chat that was served."""

    sent_s: float
    end: str
    attained: bool
    ttft_s: float | None = None


@dataclass(slots=True)
class Victim:
    """What the victim saw."""

    requests: list[Ended] = field(default_factory=list)

    @property
    def adherence(self) -> float:
        """Attained requests by all, 0 to 1."""
        return sum(one.attained for one in self.requests) / max(1, len(self.requests))

    @property
    def settled(self) -> float:
        """The adherence without the first `START_S`."""
        return Victim([one for one in self.requests if one.sent_s >= START_S]).adherence

    @property
    def ends(self) -> dict[str, int]:
        """Number of requests by end."""
        return dict(Counter(one.end for one in self.requests))

    @property
    def ttft_s(self) -> list[float]:
        """Of the chats that were served, in ascending order."""
        return sorted(one.ttft_s for one in self.requests if one.ttft_s is not None)


async def run_victim(url: str, key: str, seconds: float, seed: int, warm_s: float = 0.0) -> Victim:
    """Send requests for ``seconds``, each on a connection of its own, and return how they ended.

    ``warm_s``: seconds before these, in which it sends requests that do not count.
    """
    victim, jitter = Victim(), random.Random(seed)
    headers = {"authorization": f"Bearer {key}", "connection": "close"}
    async with (
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False, headers=headers, verify=False) as http,
        asyncio.TaskGroup() as group,
    ):
        started = time.monotonic() + warm_s

        async def ask(number: int) -> None:
            sent, ask_one = time.monotonic(), _embed if number % 4 == 3 else _chat
            try:
                end, attained, ttft_s = await ask_one(http, PADDING if number % 2 else "")
            except httpx.HTTPError as error:
                end, attained, ttft_s = type(error).__name__, False, None
            if number >= 0:
                victim.requests.append(Ended(sent - started, end, attained, ttft_s))

        for number in range(-round(warm_s * PER_S), round(seconds * PER_S)):
            await asyncio.sleep(max(0.0, started + (number + jitter.random()) / PER_S - time.monotonic()))
            group.create_task(ask(number))
    return victim


async def _chat(http: httpx.AsyncClient, padding: str) -> tuple[str, bool, float | None]:
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
    tpot_s = (last_s - first_s) / max(1, tokens - 1)
    attained = end == "200" and tokens >= TOKENS and first_s <= TTFT_S and tpot_s <= TPOT_S
    return end, attained, first_s if tokens and end == "200" else None


async def _embed(http: httpx.AsyncClient, padding: str) -> tuple[str, bool, None]:
    started = time.monotonic()
    answer = await http.post("/v1/embeddings", json={"input": "x", "unused": padding})
    in_time = time.monotonic() - started <= EMBEDDING_S
    return str(answer.status_code), answer.status_code == 200 and in_time, None
