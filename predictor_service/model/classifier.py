"""SCORPIO's length model: a language-model backbone that classifies a prompt into bins of output lengths.

    h = hidden state of the prompt's last token,     p = softmax(W h + b),      one probability for each bin

(SCORPIO, section 3.2 and appendix A.1: OPT-125M and one linear layer.) The served p50 and p90 are quantiles of p. Their
levels are set on the validation part, so that p50 covers half of the answers and p90 covers nine in ten.

NOTE: this module imports torch and transformers. It is imported only for a model whose card names this family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import nn

from predictor_service.model.buckets import BinIndices, Buckets
from predictor_service.model.length_model import Card, ModelUnusable, Prediction, write_card

HEAD_FILE, BACKBONE_FOLDER = "length_head.safetensors", "backbone"
SERVE_ROWS = 16
"""Prompts in one forward pass. Bounds memory; prompts are sorted by length first, so that padding stays small."""

Floats = NDArray[np.float64]


class NeedsText(ValueError):  # noqa: N818
    """This model reads prompts, but was given hashed features."""


class Network(nn.Module):  # type: ignore[misc]
    """Backbone and linear head."""

    def __init__(self, backbone: Any, bins: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_width(backbone), bins)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return one logit for each bin, shape (rows, bins).

        ``ids`` and ``mask``: token ids and attention mask, shape (rows, tokens), padded on the right.
        """
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        last = mask.sum(dim=1) - 1
        return self.head(states[torch.arange(len(ids), device=ids.device), last])


def hidden_width(backbone: Any) -> int:
    """Return the width of the backbone's last hidden state, from a forward pass: config field names differ."""
    device = next(backbone.parameters()).device
    one = torch.ones((1, 1), dtype=torch.long, device=device)
    with torch.no_grad():
        return int(backbone(input_ids=one, attention_mask=one).last_hidden_state.shape[-1])


@dataclass(slots=True)
class PromptEncoder:
    """Turns prompts into token ids, in training and in serving alike. Keeps the first ``max_tokens`` of a prompt."""

    tokenizer: Any
    max_tokens: int

    def encode(self, prompt: str) -> list[int]:
        """Return the prompt's token ids, at least one."""
        text = prompt.encode("utf-8", "replace").decode("utf-8")  # tokenizers reject lone surrogates
        ids = list(self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"])
        return ids or [self._pad_id]

    def pad(self, rows: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and attention mask, both of shape (rows, longest)."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
        return ids.to(device), mask.to(device)

    @property
    def _pad_id(self) -> int:
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)


@dataclass(slots=True)
class LengthClassifier:
    """Network, prompt encoder, bins and card; implements `predictor_service.model.length_model.LengthPredictor`.

    ``levels``: the levels of the predicted distribution that are served as p50 and p90.
    """

    network: Network
    encoder: PromptEncoder
    buckets: Buckets
    levels: tuple[float, float]
    card: Card
    reads_text: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The length model's id, from its card."""
        return str(self.card["model"])

    def predict(self, rows: Sequence[Any]) -> list[Prediction]:
        """Return one `Prediction` for each prompt, before any clamp.

        Raises:
            NeedsText: a row is not a string.
        """
        probabilities = self.probabilities(rows)
        p50 = np.maximum(self.buckets.quantiles(probabilities, self.levels[0]), 1.0)
        p90 = np.maximum(self.buckets.quantiles(probabilities, self.levels[1]), p50)
        return [Prediction(length=a, p50=a, p90=b) for a, b in zip(p50.tolist(), p90.tolist(), strict=True)]

    def classify(self, rows: Sequence[Any]) -> BinIndices:
        """Return the most probable bin of each prompt, as the paper does; shape (rows,)."""
        return np.asarray(self.probabilities(rows).argmax(axis=1), dtype=np.int64)

    def probabilities(self, rows: Sequence[Any]) -> Floats:
        """Return each prompt's probability of each bin; shape (rows, bins)."""
        if not all(isinstance(row, str) for row in rows):
            raise NeedsText("this model reads prompts, not features")
        device = next(self.network.parameters()).device
        encoded = [self.encoder.encode(row) for row in rows]
        probabilities = np.empty((len(rows), self.buckets.count))
        by_length = sorted(range(len(rows)), key=lambda at: len(encoded[at]))
        self.network.eval()
        with torch.inference_mode():
            for first in range(0, len(rows), SERVE_ROWS):
                batch = by_length[first : first + SERVE_ROWS]
                logits = self.network(*self.encoder.pad([encoded[at] for at in batch], device))
                probabilities[batch] = torch.softmax(logits.double(), dim=1).cpu().numpy()
        return probabilities

    def save(self, folder: Path) -> None:
        """Write backbone, head, bins and card into ``folder``, as safetensors and JSON: no executable content."""
        folder.mkdir(parents=True, exist_ok=True)
        self.network.backbone.save_pretrained(folder / BACKBONE_FOLDER, safe_serialization=True)
        self.encoder.tokenizer.save_pretrained(folder / BACKBONE_FOLDER)
        head = self.network.head
        tensors = {
            "weight": head.weight.detach().float().cpu().numpy(),
            "bias": head.bias.detach().float().cpu().numpy(),
            "edges": self.buckets.edges,
            "levels": np.array(self.levels),
        }
        (folder / HEAD_FILE).write_bytes(save(tensors))
        write_card(folder, self.card)


def load_classifier(folder: Path, card: Card) -> LengthClassifier:
    """Read what `LengthClassifier.save` wrote.

    Raises:
        ModelUnusable: a file is missing or damaged.
    """
    try:
        tensors = load_file(folder / HEAD_FILE)
        backbone, tokenizer = load_backbone(str(folder / BACKBONE_FOLDER))
        network = Network(backbone, len(tensors["bias"]))
        network.head.load_state_dict(
            {"weight": torch.from_numpy(tensors["weight"]), "bias": torch.from_numpy(tensors["bias"])}
        )
        low, high = (float(level) for level in tensors["levels"])
        recipe = card["recipe"]
        # NOTE: cards of earlier versions name this field "most_prompt_tokens".
        field = "max_prompt_tokens" if "max_prompt_tokens" in recipe else "most_prompt_tokens"
        encoder = PromptEncoder(tokenizer, int(recipe[field]))
        return LengthClassifier(to_accelerator(network), encoder, Buckets(tensors["edges"]), (low, high), card)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelUnusable(f"the length classifier in {folder} cannot be read: {error}") from None


def load_backbone(base: str) -> tuple[Any, Any]:
    """Return backbone (without a head) and tokenizer of a local folder or a Hugging Face name.

    Code that comes with a model is never run.

    Raises:
        OSError: transformers cannot find or read ``base``.
        ValueError: transformers does not know this kind of model.
    """
    from transformers import AutoModel, AutoTokenizer

    backbone = AutoModel.from_pretrained(base, trust_remote_code=False, dtype=torch.float32)
    return backbone, AutoTokenizer.from_pretrained(base, trust_remote_code=False)


def to_accelerator(network: Network) -> Network:
    """Move ``network`` to the GPU if there is one, and return it."""
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    return network
