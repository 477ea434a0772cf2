"""Measures the error of the estimated prompt size against real tokenizers (`kind: http`).

    python -m benchmarks.prompt_size.remote --json > docs/results/prompt_size.json
    python -m benchmarks.prompt_size.page docs/results/prompt_size.json

The estimate learns from the requests of one half of the texts, one after the other as a gateway does, and is evaluated
on requests of the other half. Both halves are a random mix of all kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import AsJson
from benchmarks.prompt_size.bodies import KINDS, Body, make_bodies
from benchmarks.prompt_size.tokenizers import Count, counters
from gateway.api.prompt import read_chat
from gateway.prompts.samples import sample_chats
from gateway.prompts.size_model import PromptSizeModel

LEARNED = (0, 10, 50, 500)
"""Requests learned from before an evaluation."""

PHASES = (("chat", "code"), ("CJK",), ("tools", "tool history"), ("images",))
"""Kinds of the traffic that changes, in turn."""
PHASE_REQUESTS = 100
PHASE_PARTS = ((0, 10), (10, 50), (50, PHASE_REQUESTS))
"""Requests of a phase that are evaluated together, each before it is learned from."""

console = Console(stderr=True)


class Sample:
    """A request as the estimate sees it, and its true size in tokens."""

    __slots__ = ("features", "kind", "tokens")

    def __init__(self, kind: str, body: Body, count: Count) -> None:
        self.kind = kind
        self.features = read_chat(body).features
        self.tokens = count(body)

    def error(self, model: PromptSizeModel) -> float:
        """Return the relative error of the estimate; positive if it is too high."""
        return model.tokens(self.features) / self.tokens - 1


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Return the quantiles of the absolute errors, and the median of the signed ones."""
    absolute = np.abs(errors)
    return {
        "requests": len(errors),
        "p50": round(float(np.quantile(absolute, 0.5)), 4),
        "p90": round(float(np.quantile(absolute, 0.9)), 4),
        "worst": round(float(absolute.max()), 4),
        "bias": round(float(np.median(errors)), 4),
    }


def by_kind(samples: Sequence[Sample], model: PromptSizeModel) -> list[dict[str, Any]]:
    """Return the summary of each kind, and of all samples."""
    errors = [(sample.kind, sample.error(model)) for sample in samples]
    kinds = [kind for kind in KINDS if any(kind == k for k, _ in errors)]
    rows = [{"kind": kind, **summary([e for k, e in errors if k == kind])} for kind in kinds]
    return [*rows, {"kind": "all", **summary([e for _, e in errors])}]


def learning(
    name: str, train: Sequence[Sample], test: Sequence[Sample], calibration: Sequence[Sample] = ()
) -> list[dict[str, Any]]:
    """Return the errors on ``test``, after as many samples of ``train`` as `LEARNED` says.

    ``calibration``: the sample chats that a vLLM server counts when it comes up; none for another server.
    """
    model, rows = PromptSizeModel(), []
    for sample in calibration:
        model.learn(sample.features, sample.tokens)
    given = {"tokenizer": name, "calibrated": bool(calibration)}
    for at in range(len(train) + 1):
        if at in LEARNED:
            rows += [{**given, "learned": at, **row} for row in by_kind(test, model)]
        if at < len(train):
            model.learn(train[at].features, train[at].tokens)
    return rows


def changing(name: str, phases: Sequence[Sequence[Sample]]) -> list[dict[str, Any]]:
    """Return the errors of traffic that changes its kind, each request before it is learned from."""
    model, rows = PromptSizeModel(), []
    for phase in phases:
        errors = []
        for sample in phase:
            errors.append(sample.error(model))
            model.learn(sample.features, sample.tokens)
        kinds = " and ".join(sorted({sample.kind for sample in phase}))
        parts = [(first, last) for first, last in PHASE_PARTS if first < len(errors)]
        rows += [
            {"tokenizer": name, "phase": kinds, "from": first, "to": last, **summary(errors[first:last])}
            for first, last in parts
        ]
    return rows


def study(tokenizers: dict[str, Count], train: int, test: int, seed: int) -> dict[str, Any]:
    """Return the document of the study: ``train`` requests to learn from, ``test`` to evaluate on."""
    learn_from, evaluate_on = make_bodies(KINDS, train, 0, seed), make_bodies(KINDS, test, 1, seed + 1)
    phases = [make_bodies(kinds, PHASE_REQUESTS, 1, seed + 2 + at) for at, kinds in enumerate(PHASES)]
    learned: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    sizes = []
    for name, count in tokenizers.items():
        console.print(f"Tokenising for {name}…")
        test_samples = [Sample(kind, body, count) for kind, body in evaluate_on]
        train_samples = [Sample(kind, body, count) for kind, body in learn_from]
        learned += learning(name, train_samples, test_samples)
        calibration = [Sample("sample", chat, count) for chat in sample_chats()]
        learned += learning(name, train_samples, test_samples, calibration)
        changed += changing(name, [[Sample(kind, body, count) for kind, body in phase] for phase in phases])
        tokens = [sample.tokens for sample in test_samples]
        p10, p50, p90 = (round(float(q)) for q in np.quantile(tokens, (0.1, 0.5, 0.9)))
        sizes.append({"tokenizer": name, "p10": p10, "p50": p50, "p90": p90})
    return {"seed": seed, "train": train, "test": test, "sizes": sizes, "learning": learned, "changing": changed}


def main(
    train: Annotated[int, typer.Option(min=1, help="Requests to learn from.")] = max(LEARNED),
    test: Annotated[int, typer.Option(min=1, help="Requests to evaluate on.")] = 450,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare estimated prompt sizes with those of real tokenizers."""
    found = study(counters(), train, test, seed)
    if as_json:
        sys.stdout.write(results_json.dumps(found))
        return
    for row in found["learning"]:
        if row["kind"] == "all":
            console.print(f"{row['tokenizer']} after {row['learned']}: p50 {row['p50']:.1%}, p90 {row['p90']:.1%}")


if __name__ == "__main__":
    typer.run(main)
