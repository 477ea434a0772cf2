"""How long prompts and answers are, in tokens: by workload name, from data files and from log-normals."""

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
    """Log-normal lengths (tokens): exp(N(mu, sigma)), cut to [least, most]."""

    mu: float
    sigma: float
    least: int
    most: int

    def draw(self, random: np.random.Generator, n: int, most: int | None = None) -> Ints:
        """``n`` lengths, shape (n,), of at most ``most`` instead of the form's own limit."""
        drawn = np.exp(random.normal(self.mu, self.sigma, n))
        return np.clip(drawn, self.least, self.most if most is None else most).astype(np.int64)


SMALL_PROMPTS = Lengths(3.6, 1.1, 4, 600)
"""About 60 tokens in and, with `SMALL_OUTPUTS`, 75 out: what a two-core machine can serve a useful number of."""
SMALL_OUTPUTS = Lengths(4.0, 0.8, 2, 400)

_SHAREGPT_SPREAD = (1.25, 0.947)
"""Standard deviations of the logarithms of ShareGPT's prompt and output lengths, after `sharegpt`'s limits."""

LMSYS_PROMPTS = Lengths(np.log(69.5) - _SHAREGPT_SPREAD[0] ** 2 / 2, _SHAREGPT_SPREAD[0], 4, 1024)
"""Not LMSYS data, which is gated: log-normals with the means that the LMSYS-Chat-1M paper states (its table 1: 69.5
tokens a prompt, 214.5 a response, by Llama-2's tokenizer; quoted from memory) and, as that paper states no spread,
ShareGPT's. Prompt and answer are drawn independently."""
LMSYS_OUTPUTS = Lengths(np.log(214.5) - _SHAREGPT_SPREAD[1] ** 2 / 2, _SHAREGPT_SPREAD[1], 4, 1024)


@dataclass(frozen=True, slots=True)
class Rows:
    """Requests of a dataset in its own order: token counts, shape (n,), and for a trace the arrivals (s from 0)."""

    prompt_tokens: Ints
    output_tokens: Ints
    at_s: NDArray[np.float64] | None


@cache
def rows(name: str) -> Rows:
    """The data file of a workload, whole. Raises `FileNotFoundError` for a name without one."""
    with np.load(DATA / f"{name}.npz") as file:
        at_s = np.cumsum(file["gap_us"], dtype=np.int64) / 1e6 if "gap_us" in file else None
        return Rows(file["prompt_tokens"].astype(np.int64), file["output_tokens"].astype(np.int64), at_s)


Draw = Callable[[np.random.Generator, int, "int | None", "int | None"], tuple[Ints, Ints]]
"""(random, n, max_prompt, max_output) -> prompt and output lengths, each of shape (n,)."""


def _sharegpt(random: np.random.Generator, n: int, max_prompt: int | None, max_output: int | None) -> tuple[Ints, Ints]:
    # The filter of vLLM's benchmarks: at least 4 tokens each way, longer ones left out (not cut, which would pile
    # them up at the limit).
    data = rows("sharegpt")
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
        data = rows(name)
        chosen = random.integers(0, len(data.prompt_tokens), n)
        return cut(data.prompt_tokens[chosen], max_prompt), cut(data.output_tokens[chosen], max_output)

    return draw


def _lognormal(prompts: Lengths, outputs: Lengths) -> Draw:
    def draw(random: np.random.Generator, n: int, max_prompt: int | None, max_output: int | None) -> tuple[Ints, Ints]:
        # A stream each, so that the first requests do not depend on how many follow.
        first, second = random.spawn(2)
        return prompts.draw(first, n, max_prompt), outputs.draw(second, n, max_output)

    return draw


def cut(lengths: Ints, most: int | None) -> Ints:
    """Lengths of at least 1 and at most ``most``. Of a trace every arrival is kept, so what is too long is cut."""
    return np.clip(lengths, 1, most)


WORKLOADS: dict[str, Draw] = {
    "sharegpt": _sharegpt,
    "lmsys-like": _lognormal(LMSYS_PROMPTS, LMSYS_OUTPUTS),
    "azure-conv": _azure("azure-conv"),
    "azure-code": _azure("azure-code"),
    "code-chat": code_chat.draw_any,
    "small": _lognormal(SMALL_PROMPTS, SMALL_OUTPUTS),
}

TRACES = ("azure-conv", "azure-code")
"""Workloads whose rows carry arrival times."""
