"""The annealing paper's latency predictor: prefill and decode times that are bilinear in batch size and length.

With b sequences of l tokens each, prefill takes t_p(b, l) and one decode step tau_d(b, l) seconds:

    t_p(b, l)   = A*b*l + B*b + C*l + D
    tau_d(b, l) = a*b*l + b'*b + c*l + d

The decodes of a request with a prompt of l tokens and an output of o tokens sum to

    sum over k = 1..o of tau_d(b, l + k) = o*(b'*b + d) + (a*b + c)*(o*l + o*(o + 1)/2).

Both parts of a request's latency are therefore linear in b.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_adapter.step_time.linear_forms import StepTimes, fit_itl
from engine_adapter.step_time.profile import Profile

Linear = tuple[float, float]
"""(slope, intercept): slope * batch size + intercept seconds."""

Bilinear = tuple[float, float, float, float]
"""The coefficients of b*l, b, l and 1."""


@dataclass(slots=True, frozen=True)
class Latency:
    """The two bilinear forms.

    Attributes:
        prefill: A, B, C, D.
        decode: a, b', c, d.
        prefill_s_per_token: prefill time that each sequence adds to every decode step (s). Not in the paper: with
            continuous batching, prefills of later requests interrupt the decodes.
    """

    prefill: Bilinear
    decode: Bilinear
    prefill_s_per_token: float = 0.0

    @classmethod
    def of_times(cls, times: StepTimes, prefill_s_per_token: float = 0.0) -> Latency:
        """Return the forms from learned step times: SCORPIO eq. 4 is tau_d, and eq. 6 over b*l tokens is t_p."""
        return cls(
            (times.alpha, 0.0, 0.0, max(times.beta, 0.0)), (times.a, times.b, times.c, times.d), prefill_s_per_token
        )

    @classmethod
    def of_profile(cls, profile: Profile) -> Latency:
        """Return the least-squares fit to a profile: prefills of b prompts, and decode steps of b sequences."""
        sizes = np.unique(np.geomspace(1, min(64, profile.max_num_seqs), 12).round().astype(int))
        lengths = [16, 32, 64, 128, 256, 512, 1024]
        pairs = [(int(b), n) for b in sizes for n in lengths if b * n <= profile.kv_tokens]
        batch, length = np.array(pairs, dtype=np.float64).T
        decode = np.array([profile.step_seconds(b, b * n, 0, 0) for b, n in pairs])
        prefill = np.array([_prefill_seconds(profile, b, n) for b, n in pairs])
        return cls(fit_itl(batch, length, prefill), fit_itl(batch, length, decode))

    def lines(self, prompt: float, output: float, uncached: float) -> tuple[Linear, Linear]:
        """Return the prefill time and the summed decode time of a request, linear in the batch size.

        ``prompt`` is l and ``output`` is o, in tokens. ``uncached`` of the prompt must be computed.
        """
        p_bl, p_b, p_l, p_0 = self.prefill
        d_bl, d_b, d_l, d_0 = self.decode
        contexts = output * prompt + output * (output + 1) / 2
        prefill = (p_bl * uncached + p_b, p_l * uncached + p_0)
        decode = (d_bl * contexts + (d_b + self.prefill_s_per_token) * output, d_l * contexts + d_0 * output)
        return prefill, decode

    def step_s(self, batch: float, length: float) -> float:
        """Return tau_d(b, l) with the prefill time that the sequences add (s)."""
        a, b, c, d = self.decode
        return (a * batch + c) * length + (b + self.prefill_s_per_token) * batch + d


def _prefill_seconds(profile: Profile, prompts: int, tokens: int) -> float:
    """Return the seconds to prefill ``prompts`` of ``tokens`` each, in steps of at most the engine's token budget."""
    left, seconds = prompts * tokens, 0.0
    while left:
        chunk = min(left, profile.max_num_batched_tokens)
        seconds += profile.step_seconds(0, 0, chunk, 0, max(1, chunk // tokens))
        left -= chunk
    return seconds
