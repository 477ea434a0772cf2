"""What is asked of a server in a measurement: arrivals, lengths and SLOs, all from one seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAPER_SLOS: dict[str, tuple[tuple[float, float], ...]] = {
    # (TTFT s, TPOT ms) of the six categories, SCORPIO table 1.
    "llama-3.1-8b": ((0.5, 30), (2, 30), (3, 30), (0.5, 50), (1, 50), (7.5, 50)),
    "gemma-2-27b": ((1, 60), (4, 60), (6, 60), (1, 100), (2, 100), (15, 100)),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it is sent (s after the start), its sizes (tokens), its bounds (s), its category (1 to 6)."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float
    category: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths (tokens): exp(N(mu, sigma)), cut to [least, most]."""

    mu: float
    sigma: float
    least: int
    most: int

    def draw(self, random: np.random.Generator, n: int) -> np.ndarray:
        """``n`` lengths, shape (n,)."""
        return np.clip(np.exp(random.normal(self.mu, self.sigma, n)), self.least, self.most).astype(int)


# About 60 tokens in and 75 out: what a two-core machine can serve a useful number of.
SMALL_PROMPTS = Lengths(3.6, 1.1, 4, 600)
SMALL_OUTPUTS = Lengths(4.0, 0.8, 2, 400)


def poisson(
    qps: float,
    requests: int,
    seed: int,
    *,
    slos: tuple[tuple[float, float], ...] = PAPER_SLOS["llama-3.1-8b"],
    slo_scale: float = 1.0,
    prompts: Lengths = SMALL_PROMPTS,
    outputs: Lengths = SMALL_OUTPUTS,
) -> list[Asked]:
    """Poisson arrivals at ``qps`` (1/s), categories evenly at random, bounds times ``slo_scale``."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / qps, requests))
    sizes = zip(prompts.draw(random, requests), outputs.draw(random, requests), strict=True)
    categories = random.integers(0, len(slos), requests)
    return [
        Asked(
            at_s=float(at),
            prompt_tokens=int(prompt),
            output_tokens=int(output),
            ttft_slo_s=slos[category][0] * slo_scale,
            tpot_slo_s=slos[category][1] / 1000 * slo_scale,
            category=int(category) + 1,
        )
        for at, (prompt, output), category in zip(times, sizes, categories, strict=True)
    ]
