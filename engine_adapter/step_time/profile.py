"""Step-time profiles: the duration of engine steps on known hardware, as data for the simulator and for policies.

A step computes ``n = decodes + prefill_tokens`` tokens. Its time is piecewise linear in n, plus the cost of attention.
(A GPU works in waves of tiles: times rise in steps, and a few tokens cost as much as one.) In the regime of n:

    step = base + per_token*n + per_prefill_token*prefill_tokens + per_decode*decodes
         + per_decode_context*decode_context + per_prefill_context*prefill_context
         + per_prefill_pair*(query-key pairs of the prefill)
         + per_decode_step (if anything decodes) + per_prefill_step (if anything prefills)

The last three terms belong to attention: the cost of a prefill chunk by its area, and fixed costs of decode and
prefill. Published forms do not have them. A chunk of c tokens after s computed tokens has c*(s + c/2) query-key pairs.
`Profile.step_seconds` gets sums only, so it assumes that all chunks of a step have the same length.
Seconds and tokens throughout. The shipped profiles are JSON files in ``engine_adapter/step_time/profiles``.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine_adapter.step_time.linear_forms import Floats, StepTimes, fit_itl, fit_prefill
from engine_adapter.suggestion import did_you_mean

FORMAT = 1
"""Version of the profile file format."""

_SHIPPED = Path(__file__).with_name("profiles")
_CONTEXTS = (32, 64, 128, 256, 512, 1024, 2048)
"""Mean contexts (tokens) over which eq. 4 is fitted to a profile."""
_Row = tuple[float, float, float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Regime:
    """A linear form for steps of a range of sizes. Coefficients are in seconds.

    Attributes:
        up_to_tokens: largest step, inclusive, in tokens; infinite for the last regime.
        base: intercept; may be negative in a steep regime.
        per_token: per token of either kind.
        per_prefill_token: per prefill token.
        per_decode: per decoding sequence.
        per_decode_context: per context token of the decoding sequences.
        per_prefill_context: per token computed before a prefill chunk.
        per_prefill_pair: per query-key pair of prefill attention.
        per_decode_step: of a step with decodes.
        per_prefill_step: of a step with prefill tokens.
    """

    up_to_tokens: float
    base: float
    per_token: float
    per_prefill_token: float
    per_decode: float
    per_decode_context: float
    per_prefill_context: float
    per_prefill_pair: float = 0.0
    per_decode_step: float = 0.0
    per_prefill_step: float = 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """Step times of one model on one kind of hardware. Sizes are in tokens.

    Attributes:
        provenance: the source of the numbers.
        regimes: in increasing order of ``up_to_tokens``.
        max_num_seqs, max_num_batched_tokens, max_model_len, kv_tokens: limits of a typical deployment.
        plans_ahead: as in `EngineState`.
        quality: R2, RMSE (ms), MAPE (a fraction) and number of samples on held-out steps, under ``prefill`` and
            ``itl``. Empty if the data of a published form is not available.

    Raises:
        ValueError: no regimes, regimes out of order, or a limit that is not positive.
    """

    name: str
    description: str
    provenance: dict[str, Any]
    regimes: tuple[Regime, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_tokens: int
    plans_ahead: bool = False
    quality: dict[str, Any] = field(default_factory=dict)
    _bounds: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _rows: tuple[_Row, ...] = field(init=False, repr=False, compare=False)
    _times: StepTimes | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bounds = tuple(regime.up_to_tokens for regime in self.regimes)
        if not bounds or bounds[-1] != math.inf or any(a >= b for a, b in zip((0.0, *bounds), bounds, strict=False)):
            raise ValueError(f"profile {self.name}: regimes need increasing up_to_tokens, the last one infinite")
        for limit in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_tokens"):
            if getattr(self, limit) <= 0:
                raise ValueError(f"profile {self.name}: {limit} must be positive")
        # Sums that `step_seconds` needs, precomputed because the simulator calls it for every step.
        rows = tuple(
            (
                r.base + r.per_decode_step,
                r.base + r.per_prefill_step,
                r.base + r.per_decode_step + r.per_prefill_step,
                r.per_token + r.per_decode,
                r.per_decode_context,
                r.per_token + r.per_prefill_token,
                r.per_prefill_context,
                r.per_prefill_pair,
            )
            for r in self.regimes
        )
        object.__setattr__(self, "_bounds", bounds)
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_times", None)

    def at_speed(self, factor: float) -> Profile:
        """The same profile with every step ``factor`` times as long."""
        times = [f.name for f in fields(Regime) if f.name != "up_to_tokens"]
        regimes = tuple(replace(r, **{name: getattr(r, name) * factor for name in times}) for r in self.regimes)
        return replace(self, regimes=regimes)

    def step_seconds(
        self,
        decodes: int,
        decode_context: float,
        prefill_tokens: int,
        prefill_context: float,
        prefill_chunks: int = 1,
    ) -> float:
        """Duration of a step in seconds; 0 if it has no tokens.

        Args:
            decodes: sequences that decode one token each.
            decode_context: the sum of their contexts, in tokens.
            prefill_tokens: prompt tokens computed in this step.
            prefill_context: tokens computed before each prefill chunk, summed over the chunks.
            prefill_chunks: number of prompts that the prefill tokens belong to.
        """
        tokens = decodes + prefill_tokens
        if tokens <= 0:
            return 0.0
        alone, prefilling, both, decode, context, prefill, before, pair = self._rows[bisect_left(self._bounds, tokens)]
        if not prefill_tokens:
            return alone + decode * decodes + context * decode_context
        return (
            (both if decodes else prefilling)
            + decode * decodes
            + context * decode_context
            + prefill * prefill_tokens
            + before * prefill_context
            + pair * prefill_tokens * (prefill_context + 0.5 * prefill_tokens) / prefill_chunks
        )

    def step_times(self) -> StepTimes:
        """SCORPIO's two forms (eq. 4 and 6), fitted to this profile: the initial step times of policies.

        Eq. 4 is fitted over decode batches of 1 to ``max_num_seqs`` with contexts of 32 to 2048 tokens that fit the KV
        cache. Eq. 6 is fitted over single prompts of 16 to ``max_num_batched_tokens`` tokens. Sizes are spaced evenly
        in their logarithm, so that the fits also hold for small batches and short prompts.
        """
        if self._times is None:
            a, b, c, d = fit_itl(*self._decode_steps())
            shortest, longest = min(16, self.max_num_batched_tokens), self.max_num_batched_tokens
            prompts = np.unique(np.geomspace(shortest, longest, 160).round().astype(int))
            seconds = np.array([self.step_seconds(0, 0, int(p), 0) for p in prompts])
            alpha, beta, theta, delta = fit_prefill(prompts.astype(np.float64), seconds)
            object.__setattr__(self, "_times", StepTimes(a, b, c, d, alpha, beta, theta, delta))
        assert self._times is not None
        return self._times

    def with_quality(self, quality: dict[str, Any]) -> Profile:
        """The same profile with another ``quality``."""
        return Profile(**{f.name: getattr(self, f.name) for f in fields(self) if f.init} | {"quality": quality})

    def _decode_steps(self) -> tuple[Floats, Floats, Floats]:
        """Batch sizes, mean contexts and seconds of decode-only steps over the operating range."""
        batches = np.unique(np.geomspace(1, self.max_num_seqs, 48).round().astype(int))
        longest = min(self.max_model_len, _CONTEXTS[-1])
        steps = [
            (batch, length, self.step_seconds(int(batch), int(batch) * length, 0, 0))
            for batch in batches
            for length in _CONTEXTS
            if length <= longest and batch * length <= self.kv_tokens
        ]
        batch, length, seconds = np.array(steps, dtype=np.float64).T
        return batch, length, seconds


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Load a shipped profile by name, or any profile by the path of its ``.json`` file.

    Raises:
        ValueError: the profile does not exist (the message lists the shipped profiles), or the file is not a valid
            profile (the message says why).
    """
    text = str(name_or_path)
    path = Path(text) if text.endswith(".json") else _SHIPPED / f"{text}.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"no profile {text!r}: choose one of {', '.join(profile_names())}, or give the path of a .json file"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot read profile ({error})") from error
    try:
        return parse_profile(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write ``profile`` as JSON in the format of `load_profile`."""
    text = json.dumps(profile_document(profile), indent=2, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def profile_document(profile: Profile) -> dict[str, Any]:
    """``profile`` as the JSON object of its file."""
    document: dict[str, Any] = {"format": FORMAT}
    document |= {f.name: getattr(profile, f.name) for f in fields(profile) if f.init}
    # JSON cannot represent infinity.
    document["regimes"] = [
        asdict(r) | {"up_to_tokens": None if math.isinf(r.up_to_tokens) else r.up_to_tokens} for r in profile.regimes
    ]
    return document


def parse_profile(document: Any) -> Profile:
    """Return the profile of a JSON document (`profile_document`). Raises ValueError."""
    _expect(document, dict, "a profile")
    if document.get("format") != FORMAT:
        raise ValueError(f"format is {document.get('format')!r}; this version supports {FORMAT}")
    values = {key: value for key, value in document.items() if key != "format"}
    _check_keys(values, Profile, "a profile")
    for key, kind in (("name", str), ("description", str), ("provenance", dict), ("regimes", list)):
        _expect(values[key], kind, key)
    _expect(values.get("quality", {}), dict, "quality")
    if not isinstance(values.get("plans_ahead", False), bool):
        raise ValueError("plans_ahead must be true or false")
    for key in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_tokens"):
        _expect(values[key], int, key)
    values["regimes"] = tuple(_regime(regime, f"regimes[{i}]") for i, regime in enumerate(values["regimes"]))
    return Profile(**values)


def _regime(document: Any, where: str) -> Regime:
    _expect(document, dict, where)
    _check_keys(document, Regime, where)
    values = dict(document)
    if values["up_to_tokens"] is None:
        values["up_to_tokens"] = math.inf
    for key, value in values.items():
        _expect(value, (int, float), f"{where}.{key}")
        if math.isnan(value) or (math.isinf(value) and key != "up_to_tokens"):
            raise ValueError(f"{where}.{key} must be a finite number")
    return Regime(**{key: float(value) for key, value in values.items()})


def _check_keys(values: dict[str, Any], kind: type[Profile | Regime], where: str) -> None:
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind) if f.init}
    # A misspelled field is also missing, so look for unknown ones first.
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        advice = did_you_mean(unknown[0], known, "its fields:")
        raise ValueError(f"{where} has no field {unknown[0]!r}; {advice}")
    missing = [name for name, required in known.items() if required and name not in values]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}")


def _expect(value: Any, kind: type | tuple[type, ...], where: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
        expected = names.get(kind, "a number") if isinstance(kind, type) else "a number"
        raise ValueError(f"{where} must be {expected}, not {type(value).__name__}")
