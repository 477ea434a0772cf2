"""Estimates how many tokens a prompt has where no tokenizer is at hand, and learns from the engine's own counts.

The estimate is linear in the features x of a prompt (`gateway.prompts.content`): tokens = theta . x. For each model,
theta is refined by recursive least squares (Haykin, Adaptive Filter Theory, ch. 9) on relative errors, so that short
prompts count as much as long ones. For a prompt that the engine counted as y tokens, with z = x / y and noise s:

    k = P z / (s^2 + z . P z),    theta += k (1 - theta . z),    P += Q - k (P z)^T
"""

from __future__ import annotations

import math
from collections import OrderedDict
from operator import mul
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gateway.prompts.content import FEATURES, Features
from gateway.prompts.media import TOKENS_PER_AUDIO_S

NOISE = 0.05
"""Relative error (standard deviation) of one count around the best linear estimate, measured on text of one kind."""

DRIFT = 1e-3
"""Share of the prior variance that returns with each count, so that the estimate follows traffic that changes."""

EARLY_COUNTS = 64
"""Counts that are all learned from. Later ones are, if the estimate was off by more than half of `NOISE`."""

MAX_MODELS = 256
"""Bounds the memory of `PromptSizes`: 15 KB for each model. The least recently used one is forgotten."""


Floats = NDArray[np.float64]


class _Prior(NamedTuple):
    """Tokens for one unit of a feature before anything is learned, and how uncertain that is (standard deviation)."""

    tokens: float
    deviation: float


_TEXT_PRIORS = (
    # Characters. Fitted to the tokenizers of Mistral NeMo, Mistral v3 and SmolLM2 on prose, code, JSON, tables and
    # base64, with room for long words.
    _Prior(0.05, 0.05),  # lower-case letters
    _Prior(0.2, 0.1),  # upper-case letters
    _Prior(0.8, 0.3),  # digits: one to three to a token
    _Prior(0.01, 0.05),  # spaces
    _Prior(0.05, 0.1),  # line ends and tabs
    _Prior(0.22, 0.15),  # punctuation
    _Prior(0.6, 0.6),  # letters with accents
    _Prior(0.4, 0.3),  # Greek, Cyrillic
    _Prior(0.5, 0.4),  # Hebrew, Arabic
    _Prior(1.0, 0.5),  # Kana
    _Prior(1.0, 0.5),  # Han
    _Prior(1.0, 0.5),  # Hangul
    _Prior(0.6, 0.6),  # other characters
    # Runs of them.
    _Prior(0.85, 0.2),
    _Prior(0.7, 0.3),
    _Prior(0.5, 0.4),
    _Prior(0.0, 0.2),
    _Prior(1.1, 0.4),
    _Prior(0.5, 0.2),
    _Prior(0.7, 1.5),
    _Prior(0.1, 0.5),
    _Prior(0.1, 0.5),
    _Prior(0.0, 0.5),
    _Prior(0.0, 0.5),
    _Prior(0.0, 0.5),
    _Prior(0.9, 0.9),
)
_PRIORS = np.array(
    [
        *_TEXT_PRIORS,
        _Prior(4.0, 20.0),  # a request: what the template adds once
        _Prior(4.0, 2.0),  # a message: its role and its delimiters
        _Prior(4.0, 8.0),  # a tool
        _Prior(20.0, 15.0),  # a call of a tool: its delimiters, its id, and those of its result
        _Prior(2.0, 300.0),  # an image: its delimiters, or all of it
        _Prior(1.0, 0.7),  # a patch of an image
        _Prior(0.0, 0.5),  # a patch of a large image again
        _Prior(TOKENS_PER_AUDIO_S, 15.0),  # a second of audio
        _Prior(0.1, 0.3),  # text of tools again: templates indent JSON
        _Prior(0.0, 0.2),  # text of tool calls again
        _Prior(0.0, 1.5),  # text of a response schema again: some servers do not render it
        _Prior(0.0, 1.0),  # reasoning again: many templates drop it from the history
    ]
)


class PromptSizeModel:
    """The estimate of one model. ``counts``: prompts that it has learned from."""

    def __init__(self) -> None:
        self.counts = 0
        self._theta: list[float] = _PRIORS[:, 0].tolist()
        self._prior_variance: Floats = _PRIORS[:, 1] ** 2
        self._covariance: Floats = np.diag(self._prior_variance)
        self._variance = self._covariance.reshape(-1)[:: FEATURES + 1]  # a view of the diagonal

    def tokens(self, features: Features) -> int:
        """Return the estimated size of a prompt, at least 1."""
        return max(1, round(self._estimate(features)))

    def learn(self, features: Features, tokens: int) -> None:
        """Learn that the engine counted ``tokens`` tokens in a prompt."""
        self.counts += 1
        error = 1.0 - self._estimate(features) / tokens
        if abs(error) < NOISE / 2 and self.counts > EARLY_COUNTS:
            return  # Such a count teaches little, and traffic that repeats would cost 10 us a request.
        z = np.array(features) / tokens
        gain = self._covariance @ z
        scale = NOISE**2 + float(z @ gain)
        self._theta = (np.array(self._theta) + gain * (error / scale)).tolist()
        gain /= math.sqrt(scale)
        self._covariance -= gain[:, None] * gain
        # Where nothing was learned this adds nothing: uncertainty never exceeds the prior.
        self._variance += DRIFT * (self._prior_variance - self._variance)

    def _estimate(self, features: Features) -> float:
        return float(sum(map(mul, self._theta, features)))


class PromptSizes:
    """One `PromptSizeModel` for each model name."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, PromptSizeModel] = OrderedDict()

    def of(self, model: str) -> PromptSizeModel:
        """Return the estimate for ``model``."""
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = PromptSizeModel()
            if len(self._models) > MAX_MODELS:
                self._models.popitem(last=False)
        else:
            self._models.move_to_end(model)
        return found


assert len(_PRIORS) == FEATURES
