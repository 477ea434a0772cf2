"""Code and chat side by side: the annealing paper's mix (arXiv 2504.14966), bounded end to end, and by TTFT and TPOT.

Lengths of chat are log-normals fitted to the project's ShareGPT lengths (the paper: ShareGPT Vicuna unfiltered). Those
of code are **not** Python-Code-23k-ShareGPT, of which no copy was at hand: log-normals with a short instruction (median
25 tokens) and an answer of code and explanation (median 280 tokens, with less spread than chat), after what is known
of that dataset. Tokens are those of the served model, more or less.
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
    # (TTFT s, TPOT ms, e2e s). Under continuous arrivals: chat, strict and easy, and code, strict and easy.
    NAME: (
        (1.0, 30, _INFINITE),
        (3.0, 50, _INFINITE),
        (_INFINITE, _INFINITE, 10.0),
        (_INFINITE, _INFINITE, 20.0),
    ),
    # The paper's own, from memory: chat 10 s and 50 ms, code 30 s.
    "annealing-paper": ((10.0, 50, _INFINITE), (_INFINITE, _INFINITE, 30.0)),
}

# mu and sigma of the logarithm of the length, least, most.
_CHAT = ((3.9, 1.25, 4, 1024), (5.15, 0.947, 4, 1024))
_CODE = ((3.22, 0.6, 4, 512), (5.63, 0.55, 16, 1024))


def draw(
    random: np.random.Generator, code: NDArray[np.bool_], max_prompt: int | None = None, max_output: int | None = None
) -> tuple[Ints, Ints]:
    """Prompt and output lengths (tokens), each of shape (n,); ``code``, of shape (n,), says which are of code."""
    found = []
    for part, most in ((0, max_prompt), (1, max_output)):
        z = random.spawn(1)[0].standard_normal(len(code))
        mu, sigma, least, limit = (np.where(code, c, t) for c, t in zip(_CODE[part], _CHAT[part], strict=True))
        limit = limit if most is None else np.minimum(limit, most)
        found.append(np.clip(np.exp(mu + sigma * z), np.minimum(least, limit), limit).astype(np.int64))
    return found[0], found[1]


def draw_any(random: np.random.Generator, n: int, max_prompt: int | None, max_output: int | None) -> tuple[Ints, Ints]:
    """As `draw`, every other request code: where nobody says which is."""
    return draw(random, np.arange(n) % 2 == 1, max_prompt, max_output)
