"""Fine-tuning a backbone to classify prompts by the length of their answers (SCORPIO, appendix A.1).

    loss = cross-entropy of the answer's bin,        Adam, constant learning rate, all weights

Every step draws its randomness from the seed and its own number, so a run that was interrupted goes on from its
checkpoint as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from predictor_service.model.buckets import DEFAULT_BINS, Buckets, Strategy, fit_buckets
from predictor_service.model.classifier import LengthClassifier, Network, Reader, load_backbone, place
from predictor_service.model.length_model import CLASSIFIER, Card
from predictor_service.training.checkpoint import Checkpoint, State, Tensors, fingerprint

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

PAPER_BASE = "facebook/opt-125m"


@dataclass(slots=True, frozen=True)
class ClassifierRecipe:
    """The paper's hyper-parameters (table 3), and how they are carried out.

    ``base`` is a local folder or a hub name. ``rows_at_once`` bounds memory: a batch's gradient is gathered from pieces
    of so many prompts. ``checkpoint_steps``: optimiser steps between two checkpoints.
    """

    base: str = PAPER_BASE
    bins: int = DEFAULT_BINS
    strategy: Strategy = "equal-width"
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    batch: int = 64
    epochs: int = 8
    most_prompt_tokens: int = 2048
    seed: int = 0
    rows_at_once: int = 16
    checkpoint_steps: int = 200


@dataclass(slots=True, frozen=True)
class Labelled:
    """Prompts and the lengths (tokens, shape (rows,)) of the answers that they got."""

    prompts: Sequence[str]
    length: Floats


def fit_classifier(
    train: Labelled,
    validation: Labelled,
    recipe: ClassifierRecipe,
    card: Card,
    workshop: Path,
    progress: Callable[[float], None] = lambda share: None,
) -> LengthClassifier:
    """Fine-tune on ``train``, set the levels of p50 and p90 on ``validation``; ``workshop`` holds the checkpoint.

    An answer that was cut off falls where it was cut: the paper knows no censoring. Raises ValueError with too little
    data; OSError when the base cannot be read.
    """
    if len(validation.length) < 20:
        raise ValueError(f"calibration needs at least 20 held-out answers, got {len(validation.length)}")
    buckets = fit_buckets(train.length, recipe.bins, recipe.strategy)
    torch.manual_seed(recipe.seed)
    backbone, tokenizer = load_backbone(recipe.base)
    most = min(recipe.most_prompt_tokens, int(getattr(backbone.config, "max_position_embeddings", 1 << 30)))
    reader = Reader(tokenizer, most)
    network = place(Network(backbone, buckets.count))
    rows = [reader.read(prompt) for prompt in train.prompts]
    key = fingerprint(asdict(recipe), train.length, np.array([sum(row) + len(row) for row in rows]))
    _fine_tune(network, reader, rows, buckets.place(train.length), recipe, Checkpoint(workshop, key), progress)
    full = card | {"family": CLASSIFIER, "recipe": asdict(recipe) | {"most_prompt_tokens": most}}
    model = LengthClassifier(network, reader, buckets, (0.5, 0.9), full)
    model.levels = _levels(model.shares(validation.prompts), buckets, validation.length)
    return model


def _fine_tune(
    network: Network,
    reader: Reader,
    rows: Sequence[list[int]],
    bins: Places,
    recipe: ClassifierRecipe,
    checkpoint: Checkpoint,
    progress: Callable[[float], None],
) -> None:
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate, betas=recipe.betas)
    a_pass = -(-len(rows) // recipe.batch)
    steps = a_pass * recipe.epochs
    done = _resume(network, optimizer, checkpoint)
    for step in range(done, steps):
        network.train()
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout's draws
        order = np.random.default_rng([recipe.seed, step // a_pass]).permutation(len(rows))
        batch = order[(step % a_pass) * recipe.batch :][: recipe.batch]
        optimizer.zero_grad()
        for first in range(0, len(batch), recipe.rows_at_once):
            some = batch[first : first + recipe.rows_at_once]
            logits = network(*reader.pad([rows[row] for row in some], device))
            wanted = torch.from_numpy(bins[some]).to(device)
            (functional.cross_entropy(logits, wanted, reduction="sum") / len(batch)).backward()
        optimizer.step()
        if (step + 1) % recipe.checkpoint_steps == 0 or step + 1 == steps:
            checkpoint.save(_tensors(network, optimizer), {"steps": step + 1})
        progress((step + 1) / steps)


def _tensors(network: Network, optimizer: torch.optim.Adam) -> Tensors:
    tensors = {f"network.{name}": weight.detach().cpu().numpy() for name, weight in network.state_dict().items()}
    for place_, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{place_}.{name}": np.asarray(value.cpu().numpy()) for name, value in state.items()}
    return tensors


def _resume(network: Network, optimizer: torch.optim.Adam, checkpoint: Checkpoint) -> int:
    """Put back what the checkpoint holds; returns the steps that it has seen."""
    stored: tuple[Tensors, State] | None = checkpoint.load()
    if stored is None:
        return 0
    tensors, state = stored
    adam: dict[int, dict[str, Any]] = {}
    weights = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "network":
            weights[rest] = torch.from_numpy(tensor)
        else:
            parameter, _, entry = rest.partition(".")
            adam.setdefault(int(parameter), {})[entry] = torch.from_numpy(tensor)
    network.load_state_dict(weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": adam})
    return int(state["steps"])


def _levels(shares: Floats, buckets: Buckets, length: Floats) -> tuple[float, float]:
    """The levels whose quantiles cover half and nine tenths of ``length``.

    Split conformal: where each answer fell in its own predicted distribution is one draw, and the levels are quantiles
    of those draws.
    """
    bins = buckets.place(length)
    rows = np.arange(len(length))
    before = np.cumsum(shares, axis=1)[rows, bins] - shares[rows, bins]
    width = buckets.edges[bins + 1] - buckets.edges[bins]
    fell = before + shares[rows, bins] * np.clip((length - buckets.edges[bins]) / width, 0.0, 1.0)
    last = 0.9 * (len(length) + 1) / len(length)
    return float(np.quantile(fell, 0.5)), float(np.quantile(fell, min(last, 1.0)))
