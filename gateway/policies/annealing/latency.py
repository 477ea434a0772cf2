"""The paper's latency predictor: prefill and decode step, each bilinear in the batch size and the length.

f(b, l) = A*b*l + B*b + C*l + D     seconds, with b requests of l tokens each
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_adapter.step_time.linear_forms import StepTimes, fit_itl
from engine_adapter.step_time.profile import Profile
from gateway.policies.annealing.search import Line

Form = tuple[float, float, float, float]
"""A, B, C, D."""


@dataclass(slots=True, frozen=True)
class Latency:
    """Both forms; ``toll_s``: what each request in the batch adds to every step, the prefill of those that follow it.

    The toll is ours: under continuous batching somebody is always being prefilled.
    """

    prefill: Form
    decode: Form
    toll_s: float = 0.0

    @classmethod
    def of_times(cls, times: StepTimes, toll_s: float = 0.0) -> Latency:
        """From the step times that the gateway learns: eq. 4 of SCORPIO is the decode form, eq. 6 over b*l tokens."""
        return cls((times.alpha, 0.0, 0.0, max(times.beta, 0.0)), (times.a, times.b, times.c, times.d), toll_s)

    @classmethod
    def of_profile(cls, profile: Profile) -> Latency:
        """Least squares over a profile's steps: b prompts of l tokens each, and b sequences at a context of l."""
        sizes = np.unique(np.geomspace(1, min(64, profile.max_num_seqs), 12).round().astype(int))
        lengths = [16, 32, 64, 128, 256, 512, 1024]
        pairs = [(int(b), n) for b in sizes for n in lengths if b * n <= profile.kv_tokens]
        batch, length = np.array(pairs, dtype=np.float64).T
        decode = np.array([profile.step_seconds(b, b * n, 0, 0) for b, n in pairs])
        prefill = np.array([_prompts_s(profile, b, n) for b, n in pairs])
        return cls(fit_itl(batch, length, prefill), fit_itl(batch, length, decode))

    def lines(self, prompt: float, output: float) -> tuple[Line, Line]:
        """Seconds to the first token, and from there to the last of ``output``, as lines in the batch size."""
        p_bl, p_b, p_l, p_0 = self.prefill
        d_bl, d_b, d_l, d_0 = self.decode
        contexts = output * prompt + output * (output + 1) / 2
        first = (p_bl * prompt + p_b, p_l * prompt + p_0)
        return first, (d_bl * contexts + (d_b + self.toll_s) * output, d_l * contexts + d_0 * output)

    def step_s(self, batch: float, length: float) -> float:
        """tau_d(b, l) and the toll (s)."""
        a, b, c, d = self.decode
        return (a * batch + c) * length + (b + self.toll_s) * batch + d


def _prompts_s(profile: Profile, prompts: int, tokens: int) -> float:
    """Seconds to prefill ``prompts`` of ``tokens`` each, in steps of at most the engine's budget."""
    left, seconds = prompts * tokens, 0.0
    while left:
        now = min(left, profile.max_num_batched_tokens)
        seconds += profile.step_seconds(0, 0, now, 0, max(1, now // tokens))
        left -= now
    return seconds
