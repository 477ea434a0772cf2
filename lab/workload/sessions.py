"""Sessions with a growing history, whose prompts share prefixes: multi-turn chats and agents.

A session belongs to an application, whose system prompt (and tool schemas) begin every prompt. Each turn adds a message
and then its answer to the history, and sends all of it. If the context is full, the next turn starts a new history.

Arrival times are fixed in advance, so that all policies get the same workload. The next turn arrives a nominal answer
time (`ANSWER_S`, `TOKEN_S`) and a pause after the last one. It arrives even if the real answer takes longer, or if the
last turn was rejected. The history always holds the answer of the workload. Sessions start as a renewal process with
the given rate divided by the mean number of turns. To have that rate from the start, sessions may begin up to
`WARMUP_S` before it. Their earlier turns are left out, of the history too.

Each request has the hashes of the blocks of its prompt and its answer (`WorkloadRequest.blocks`), so that caches and
predictions can find shared prefixes. The hashes are random numbers: the history of one session has its own, and the
system prompt of an application has the same in every session.

**Sizes.** Turns of ``multi-turn`` have the lengths of `sharegpt`, that is, of opening turns. Their number is geometric
with mean 5. (CachedAttention, Gao et al. 2024, reports a mean of 5.75 for ShareGPT, quoted from memory.) All other
numbers are conventions: system prompts, pauses, and the sizes of ``agents``. They suit the context of 8,192 tokens of
the shipped profiles. Tool schemas and results of real agents are often larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lab.workload.lengths import WORKLOADS, Draw, Lengths, lognormal

BLOCK_TOKENS = 16
"""Tokens of a block: vLLM's default block size, and that of the simulated engine."""

MAX_PROMPT = 7168
"""Default limit on a prompt with its history (tokens). An answer of 1,024 tokens then fits in a context of 8,192."""

ANSWER_S, TOKEN_S = 1.0, 0.05
"""Nominal time of an answer (s), fixed and per token. `TOKEN_S` is the loosest TPOT bound of SCORPIO's table."""

WARMUP_S = 300.0
"""How long before the start sessions may begin (s). Few sessions are longer."""

SLOS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # (TTFT s, TPOT ms, e2e s). A user waits for all steps of an agent, so the bounds are tight.
    "agents": ((0.5, 30, math.inf), (1.0, 50, math.inf)),
}


@dataclass(frozen=True, slots=True)
class SessionKind:
    """Sizes of one kind of session.

    Attributes:
        applications: tokens of the system prompt of each application, whole blocks. All are equally frequent.
        mean_turns: mean of the geometric number of turns.
        lengths: draws the messages and answers (tokens).
        pause_s: median and standard deviation of the logarithm of the pause between an answer and the next message.
        max_pause_s: longest pause (s).
    """

    applications: tuple[int, ...]
    mean_turns: float
    lengths: Draw
    pause_s: tuple[float, float]
    max_pause_s: float


SESSIONS: dict[str, SessionKind] = {
    "multi-turn": SessionKind((208, 400, 800, 1600), 5.0, WORKLOADS["sharegpt"], (8.0, 0.8), 60.0),
    # Messages are the task and tool results, answers are tool calls, and the pause is the run time of the tool.
    "agents": SessionKind(
        (1520, 2560, 3520), 20.0,
        lognormal(Lengths(math.log(150), 1.0, 10, 2000), Lengths(math.log(50), 0.6, 10, 400)),
        (1.0, 1.0), 30.0,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn. ``messages``: tokens of each message of the prompt, the system prompt first. See `WorkloadRequest`."""

    at_s: float
    category: int
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    messages: tuple[int, ...]


def turns(
    name: str,
    starts: Iterator[float],
    category: Callable[[], int],
    *,
    seed: int,
    requests: int | None,
    duration_s: float | None,
    max_prompt: int | None,
    max_output: int | None,
) -> list[Turn]:
    """Return the turns of sessions, in order of arrival, until the first limit is reached.

    Args:
        name: a key of `SESSIONS`.
        starts: times at which sessions start (s), ascending, in sessions per second times the mean number of turns.
        category: returns the SLO category of the next session.
        seed: seed of the sessions. Session i is the same for every rate and limit.
        requests, duration_s: limits on the number of turns and their arrival times; one of them is given.
        max_prompt, max_output: limits on a prompt with its history and on an answer (tokens).

    Raises:
        ValueError: ``max_prompt`` leaves no room for a message after a system prompt.
    """
    kind = SESSIONS[name]
    max_prompt = MAX_PROMPT if max_prompt is None else max_prompt
    if max_prompt <= max(kind.applications):
        raise ValueError(f"{name} has system prompts of {max(kind.applications)} tokens: max_prompt must be above that")
    applications = [_hashes(np.random.default_rng([tokens, 0xA99]), tokens) for tokens in kind.applications]
    found: list[Turn] = []
    for number, start_s in enumerate(starts):
        if duration_s is not None and start_s >= duration_s:
            break
        # A session that starts later has no earlier turn, so these turns are the first ones.
        if requests is not None and len(found) >= requests <= sum(turn.at_s <= start_s for turn in found):
            break
        random = np.random.default_rng([seed, number])
        found += _session(kind, applications, start_s, category(), random, max_prompt, max_output)
    found.sort(key=lambda turn: turn.at_s)
    return [turn for turn in found if duration_s is None or turn.at_s < duration_s][:requests]


def _session(
    kind: SessionKind,
    applications: list[list[int]],
    start_s: float,
    category: int,
    random: np.random.Generator,
    max_prompt: int,
    max_output: int | None,
) -> Iterator[Turn]:
    application = applications[int(random.integers(len(applications)))]
    count = int(random.geometric(1 / kind.mean_turns))
    messages, answers = kind.lengths(random, count, None, max_output)
    median, sigma = kind.pause_s
    pauses = np.minimum(median * np.exp(sigma * random.standard_normal(count)), kind.max_pause_s)
    at_s = start_s + np.concatenate([[0.0], np.cumsum(pauses + ANSWER_S + TOKEN_S * answers)[:-1]])
    system = len(application) * BLOCK_TOKENS
    blocks, history = list(application), [system]
    messages = np.minimum(messages, max_prompt - system)
    for at, message, answer in zip(at_s.tolist(), messages.tolist(), answers.tolist(), strict=True):
        if at < 0:
            continue
        prompt = sum(history) + message
        if prompt > max_prompt:
            blocks, history = list(application), [system]
            prompt = system + message
        blocks += _hashes(random, prompt + answer - len(blocks) * BLOCK_TOKENS)
        history.append(message)
        yield Turn(at, category, prompt, answer, tuple(blocks), tuple(history))
        history.append(answer)


def _hashes(random: np.random.Generator, tokens: int) -> list[int]:
    """Return a hash for each block of ``tokens`` tokens; the last block may be partial."""
    hashes: list[int] = random.integers(0, 1 << 63, -(-max(tokens, 0) // BLOCK_TOKENS)).tolist()
    return hashes
