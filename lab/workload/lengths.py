"""Prompt and output lengths in tokens, by workload name: from data files and from log-normal distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lab.workload import code_chat

Ints = NDArray[np.int64]

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths (tokens): exp(N(mu, sigma)), clipped to [least, most]."""

    mu: float
    sigma: float
    least: int
    most: int

    def draw(self, random: np.random.Generator, n: int, most: int | None = None) -> Ints:
        """Return ``n`` lengths, shape (n,). ``most`` replaces the default maximum."""
        drawn = np.exp(random.normal(self.mu, self.sigma, n))
        return np.clip(drawn, self.least, self.most if most is None else most).astype(np.int64)


SMALL_PROMPTS = Lengths(3.6, 1.1, 4, 600)
"""Prompts of about 60 tokens, so that an engine on two CPU cores serves a useful number of requests."""

SMALL_OUTPUTS = Lengths(4.0, 0.8, 2, 400)
"""Outputs of about 75 tokens; see `SMALL_PROMPTS`."""

_SHAREGPT_SPREAD = (1.25, 0.947)
"""Standard deviations of the logarithms of ShareGPT's prompt and output lengths, within the limits of `sharegpt`."""

LMSYS_PROMPTS = Lengths(np.log(69.5) - _SHAREGPT_SPREAD[0] ** 2 / 2, _SHAREGPT_SPREAD[0], 4, 1024)
"""Log-normal prompt lengths with the mean of the LMSYS-Chat-1M paper: 69.5 tokens (table 1, quoted from memory).

This is not LMSYS data, which is gated. The paper counts with Llama-2's tokenizer and states no spread, so the spread is
that of ShareGPT. Prompt and output lengths are independent.
"""

LMSYS_OUTPUTS = Lengths(np.log(214.5) - _SHAREGPT_SPREAD[1] ** 2 / 2, _SHAREGPT_SPREAD[1], 4, 1024)
"""Log-normal output lengths with the mean of that paper: 214.5 tokens; see `LMSYS_PROMPTS`."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Requests of a dataset, in file order: token counts, and for a trace the arrivals (s from 0); shape (n,) each."""

    prompt_tokens: Ints
    output_tokens: Ints
    at_s: NDArray[np.float64] | None


@cache
def dataset(name: str) -> Dataset:
    """Return the data file of a workload.

    Raises:
        FileNotFoundError: the workload has no data file.
    """
    with np.load(DATA / f"{name}.npz") as file:
        at_s = np.cumsum(file["gap_us"], dtype=np.int64) / 1e6 if "gap_us" in file else None
        return Dataset(file["prompt_tokens"].astype(np.int64), file["output_tokens"].astype(np.int64), at_s)


Draw = Callable[[np.random.Generator, int, "int | None", "int | None"], tuple[Ints, Ints]]
"""(random, n, max_prompt, max_output) -> prompt and output lengths (tokens), each of shape (n,)."""


def _sharegpt(random: np.random.Generator, n: int, max_prompt: int | None, max_output: int | None) -> tuple[Ints, Ints]:
    # The filter of vLLM's benchmarks: at least 4 tokens each, and longer requests are excluded. Truncating them would
    # add a peak at the limit.
    data = dataset("sharegpt")
    prompts, outputs = data.prompt_tokens, data.output_tokens
    kept = np.flatnonzero(
        (prompts >= 4)
        & (outputs >= 4)
        & (prompts <= (1024 if max_prompt is None else max_prompt))
        & (outputs <= (1024 if max_output is None else max_output))
    )
    if not len(kept):
        raise ValueError(f"sharegpt has no request within max_prompt={max_prompt}, max_output={max_output}")
    chosen = kept[random.integers(0, len(kept), n)]
    return prompts[chosen], outputs[chosen]


def _azure(name: str) -> Draw:
    def draw(random: np.random.Generator, n: int, max_prompt: int | None, max_output: int | None) -> tuple[Ints, Ints]:
        data = dataset(name)
        chosen = random.integers(0, len(data.prompt_tokens), n)
        return truncate(data.prompt_tokens[chosen], max_prompt), truncate(data.output_tokens[chosen], max_output)

    return draw


def lognormal(prompts: Lengths, outputs: Lengths) -> Draw:
    """Return a function that draws independent log-normal lengths."""

    def draw(random: np.random.Generator, n: int, max_prompt: int | None, max_output: int | None) -> tuple[Ints, Ints]:
        # Separate streams, so that the first requests do not depend on the number of requests.
        first, second = random.spawn(2)
        return prompts.draw(first, n, max_prompt), outputs.draw(second, n, max_output)

    return draw


def truncate(lengths: Ints, max_tokens: int | None) -> Ints:
    """Return ``lengths`` clipped to [1, ``max_tokens``], so that a trace keeps every arrival."""
    return np.clip(lengths, 1, max_tokens)


WORKLOADS: dict[str, Draw] = {
    "sharegpt": _sharegpt,
    "lmsys-like": lognormal(LMSYS_PROMPTS, LMSYS_OUTPUTS),
    "azure-conv": _azure("azure-conv"),
    "azure-code": _azure("azure-code"),
    "code-chat": code_chat.draw_alternating,
    "small": lognormal(SMALL_PROMPTS, SMALL_OUTPUTS),
}

TRACES = ("azure-conv", "azure-code")
"""Workloads whose datasets have arrival times."""
