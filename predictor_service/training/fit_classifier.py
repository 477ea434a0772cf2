"""Fine-tunes a backbone that classifies prompts by the length of their answers (SCORPIO, appendix A.1).

    loss = cross-entropy of the answer's bin,        Adam, constant learning rate, all weights

The random numbers of a step depend on the seed and the number of the step only. So a run that resumes from its
checkpoint gives the same model as one that was never interrupted.
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

from predictor_service.model.buckets import DEFAULT_BINS, BinIndices, Buckets, Strategy, fit_buckets
from predictor_service.model.classifier import LengthClassifier, Network, PromptEncoder, load_backbone, to_accelerator
from predictor_service.model.length_model import CLASSIFIER, Card
from predictor_service.training.checkpoint import Checkpoint, State, Tensors, fingerprint

Floats = NDArray[np.float64]

PAPER_BASE = "facebook/opt-125m"


@dataclass(slots=True, frozen=True)
class ClassifierRecipe:
    """Hyper-parameters of the paper (table 3) and settings of the run. They are stored in the model card.

    ``base``: a local folder or a Hugging Face name. ``max_prompt_tokens``: longer prompts are truncated.
    ``rows_at_once``: prompts in one forward pass; a batch accumulates gradients over several, which bounds memory.
    ``checkpoint_steps``: optimiser steps between two checkpoints.
    """

    base: str = PAPER_BASE
    bins: int = DEFAULT_BINS
    strategy: Strategy = "equal-width"
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    batch: int = 64
    epochs: int = 8
    max_prompt_tokens: int = 2048
    seed: int = 0
    rows_at_once: int = 16
    checkpoint_steps: int = 200


@dataclass(slots=True, frozen=True)
class Labelled:
    """Prompts and the lengths of their answers (tokens, shape (rows,))."""

    prompts: Sequence[str]
    length: Floats


def fit_classifier(
    train: Labelled,
    validation: Labelled,
    recipe: ClassifierRecipe,
    card: Card,
    checkpoint_folder: Path,
    progress: Callable[[float], None] = lambda share: None,
) -> LengthClassifier:
    """Fine-tune on ``train`` and set the levels of p50 and p90 on ``validation``.

    As in the paper, there is no censoring: a truncated answer counts with its recorded length.

    Raises:
        ValueError: there is too little data.
        OSError: the base cannot be read.
    """
    if len(validation.length) < 20:
        raise ValueError(f"calibration needs at least 20 held-out answers, got {len(validation.length)}")
    buckets = fit_buckets(train.length, recipe.bins, recipe.strategy)
    torch.manual_seed(recipe.seed)
    backbone, tokenizer = load_backbone(recipe.base)
    max_tokens = min(recipe.max_prompt_tokens, int(getattr(backbone.config, "max_position_embeddings", 1 << 30)))
    encoder = PromptEncoder(tokenizer, max_tokens)
    network = to_accelerator(Network(backbone, buckets.count))
    rows = [encoder.encode(prompt) for prompt in train.prompts]
    key = fingerprint(asdict(recipe), train.length, np.array([sum(row) + len(row) for row in rows]))
    _fine_tune(
        network, encoder, rows, buckets.index_of(train.length), recipe, Checkpoint(checkpoint_folder, key), progress
    )
    full = card | {"family": CLASSIFIER, "recipe": asdict(recipe) | {"max_prompt_tokens": max_tokens}}
    model = LengthClassifier(network, encoder, buckets, (0.5, 0.9), full)
    model.levels = _levels(model.probabilities(validation.prompts), buckets, validation.length)
    return model


def _fine_tune(
    network: Network,
    encoder: PromptEncoder,
    rows: Sequence[list[int]],
    bins: BinIndices,
    recipe: ClassifierRecipe,
    checkpoint: Checkpoint,
    progress: Callable[[float], None],
) -> None:
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate, betas=recipe.betas)
    steps_per_epoch = -(-len(rows) // recipe.batch)
    steps = steps_per_epoch * recipe.epochs
    done = _resume(network, optimizer, checkpoint)
    for step in range(done, steps):
        network.train()
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # for dropout
        order = np.random.default_rng([recipe.seed, step // steps_per_epoch]).permutation(len(rows))
        batch = order[(step % steps_per_epoch) * recipe.batch :][: recipe.batch]
        optimizer.zero_grad()
        for first in range(0, len(batch), recipe.rows_at_once):
            piece = batch[first : first + recipe.rows_at_once]
            logits = network(*encoder.pad([rows[row] for row in piece], device))
            target = torch.from_numpy(bins[piece]).to(device)
            (functional.cross_entropy(logits, target, reduction="sum") / len(batch)).backward()
        optimizer.step()
        if (step + 1) % recipe.checkpoint_steps == 0 or step + 1 == steps:
            checkpoint.save(_tensors(network, optimizer), {"steps": step + 1})
        progress((step + 1) / steps)


def _tensors(network: Network, optimizer: torch.optim.Adam) -> Tensors:
    tensors = {f"network.{name}": weight.detach().cpu().numpy() for name, weight in network.state_dict().items()}
    for parameter, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{parameter}.{name}": np.asarray(value.cpu().numpy()) for name, value in state.items()}
    return tensors


def _resume(network: Network, optimizer: torch.optim.Adam, checkpoint: Checkpoint) -> int:
    """Restore network and optimiser from the checkpoint, and return the number of steps done."""
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


def _levels(probabilities: Floats, buckets: Buckets, length: Floats) -> tuple[float, float]:
    """Return the levels whose quantiles cover half and nine tenths of ``length`` (tokens, shape (rows,)).

    Split conformal prediction: the levels are quantiles of each answer's position in its own predicted distribution.
    """
    bins = buckets.index_of(length)
    rows = np.arange(len(length))
    before = np.cumsum(probabilities, axis=1)[rows, bins] - probabilities[rows, bins]
    width = buckets.edges[bins + 1] - buckets.edges[bins]
    position = before + probabilities[rows, bins] * np.clip((length - buckets.edges[bins]) / width, 0.0, 1.0)
    last = 0.9 * (len(length) + 1) / len(length)
    return float(np.quantile(position, 0.5)), float(np.quantile(position, min(last, 1.0)))
