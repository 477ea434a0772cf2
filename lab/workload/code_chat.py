"""The annealing paper's mix (arXiv 2504.14966): code with end-to-end bounds, and chat with TTFT and TPOT bounds.

Chat lengths are log-normals fitted to the project's ShareGPT lengths (the paper: ShareGPT Vicuna unfiltered). Code
lengths are **not** those of Python-Code-23k-ShareGPT, which was not available. They are log-normals that follow the
published description of that dataset. An instruction has a median of 25 tokens. An answer of code and explanation has
a median of 280 tokens, with less spread than chat. Token counts are approximate for any served model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lab.workload.lengths import Ints

NAME = "code-chat"

_INFINITE = math.inf

SLOS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # (TTFT s, TPOT ms, e2e s). Categories for continuous arrivals: strict chat, loose chat, strict code, loose code.
    NAME: (
        (1.0, 30, _INFINITE),
        (3.0, 50, _INFINITE),
        (_INFINITE, _INFINITE, 10.0),
        (_INFINITE, _INFINITE, 20.0),
    ),
    # The paper's bounds, quoted from memory: chat 10 s and 50 ms, code 30 s.
    "annealing-paper": ((10.0, 50, _INFINITE), (_INFINITE, _INFINITE, 30.0)),
}

# (mu, sigma, minimum, maximum) of prompt and output lengths; mu and sigma are those of the logarithm.
_CHAT = ((3.9, 1.25, 4, 1024), (5.15, 0.947, 4, 1024))
_CODE = ((3.22, 0.6, 4, 512), (5.63, 0.55, 16, 1024))


def draw(
    random: np.random.Generator, code: NDArray[np.bool_], max_prompt: int | None = None, max_output: int | None = None
) -> tuple[Ints, Ints]:
    """Return prompt and output lengths (tokens), each of shape (n,). ``code``, shape (n,), marks the code requests."""
    lengths = []
    for part, max_tokens in ((0, max_prompt), (1, max_output)):
        z = random.spawn(1)[0].standard_normal(len(code))
        mu, sigma, least, limit = (np.where(code, c, t) for c, t in zip(_CODE[part], _CHAT[part], strict=True))
        limit = limit if max_tokens is None else np.minimum(limit, max_tokens)
        lengths.append(np.clip(np.exp(mu + sigma * z), np.minimum(least, limit), limit).astype(np.int64))
    return lengths[0], lengths[1]


def draw_alternating(
    random: np.random.Generator, n: int, max_prompt: int | None, max_output: int | None
) -> tuple[Ints, Ints]:
    """Return lengths as `draw` does, with every second request code."""
    return draw(random, np.arange(n) % 2 == 1, max_prompt, max_output)
