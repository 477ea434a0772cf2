"""The paper's length model as it is served: a language-model backbone that classifies a prompt into bins of lengths.

    h = hidden state of the prompt's last token,     shares = softmax(W h + b),      one share a bin

(SCORPIO, section 3.2 and appendix A.1: OPT-125M and one linear layer.) The quantiles of that distribution are the
prediction. Two levels, set on answers that the fit has not seen, stand in for 0.5 and 0.9, so that the median is one
and p90 covers nine answers in ten.

Imports torch and transformers, and is imported only for a folder whose card names this family.
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

from predictor_service.model.buckets import Buckets, Places
from predictor_service.model.length_model import Card, ModelUnusable, Prediction, write_card

HEAD_FILE, BACKBONE_FOLDER = "length_head.safetensors", "backbone"
SERVE_ROWS = 16
"""Prompts in one forward pass; they are padded to the longest of them, so neighbours in length go together."""

Floats = NDArray[np.float64]


class NeedsText(ValueError):  # noqa: N818 - it names what is wrong
    """This family reads prompts, not their hashed features."""


class Network(nn.Module):  # type: ignore[misc]
    """Backbone and head. ``forward`` takes token ids and their mask, both of shape (rows, tokens), padded at the right,
    and returns one logit a bin, shape (rows, bins)."""

    def __init__(self, backbone: Any, bins: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_width(backbone), bins)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Shape (rows, bins)."""
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        last = mask.sum(dim=1) - 1
        return self.head(states[torch.arange(len(ids), device=ids.device), last])


def hidden_width(backbone: Any) -> int:
    """The width of the backbone's last hidden state, asked of the backbone: no two configurations name it alike."""
    device = next(backbone.parameters()).device
    one = torch.ones((1, 1), dtype=torch.long, device=device)
    with torch.no_grad():
        return int(backbone(input_ids=one, attention_mask=one).last_hidden_state.shape[-1])


@dataclass(slots=True)
class Reader:
    """Prompts to token ids, cut to the first ``most_tokens``, in training as in serving."""

    tokenizer: Any
    most_tokens: int

    def read(self, prompt: str) -> list[int]:
        """At least one id, whatever the prompt."""
        text = prompt.encode("utf-8", "replace").decode("utf-8")  # lone surrogates: no tokenizer takes them
        ids = list(self.tokenizer(text, truncation=True, max_length=self.most_tokens)["input_ids"])
        return ids or [self._filler]

    def pad(self, rows: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of shape (rows, longest)."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._filler, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
        return ids.to(device), mask.to(device)

    @property
    def _filler(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)


@dataclass(slots=True)
class LengthClassifier:
    """Network, tokenizer, bins and card, behind the same interface as
    `predictor_service.model.length_model.LengthModel`.

    ``levels``: the levels of the predicted distribution that are served as p50 and p90.
    """

    network: Network
    reader: Reader
    buckets: Buckets
    levels: tuple[float, float]
    card: Card
    reads_text: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The predictor model's id, from its card."""
        return str(self.card["model"])

    def predict(self, rows: Sequence[Any]) -> list[Prediction]:
        """One `Prediction` a prompt, before any clamp. Raises `NeedsText` for hashed features."""
        shares = self.shares(rows)
        p50 = np.maximum(self.buckets.quantiles(shares, self.levels[0]), 1.0)
        p90 = np.maximum(self.buckets.quantiles(shares, self.levels[1]), p50)
        return [Prediction(length=a, p50=a, p90=b) for a, b in zip(p50.tolist(), p90.tolist(), strict=True)]

    def classify(self, rows: Sequence[Any]) -> Places:
        """The most probable bin of each prompt, as the paper reads it; shape (rows,)."""
        return np.asarray(self.shares(rows).argmax(axis=1), dtype=np.int64)

    def shares(self, rows: Sequence[Any]) -> Floats:
        """Each prompt's probability of each bin; shape (rows, bins)."""
        if not all(isinstance(row, str) for row in rows):
            raise NeedsText("this model reads prompts, not features")
        device = next(self.network.parameters()).device
        read = [self.reader.read(row) for row in rows]
        shares = np.empty((len(rows), self.buckets.count))
        by_length = sorted(range(len(rows)), key=lambda at: len(read[at]))
        self.network.eval()
        with torch.inference_mode():
            for first in range(0, len(rows), SERVE_ROWS):
                places = by_length[first : first + SERVE_ROWS]
                logits = self.network(*self.reader.pad([read[at] for at in places], device))
                shares[places] = torch.softmax(logits.double(), dim=1).cpu().numpy()
        return shares

    def save(self, folder: Path) -> None:
        """Write backbone, head, bins and card into ``folder``: safetensors and JSON, nothing that is executed."""
        folder.mkdir(parents=True, exist_ok=True)
        self.network.backbone.save_pretrained(folder / BACKBONE_FOLDER, safe_serialization=True)
        self.reader.tokenizer.save_pretrained(folder / BACKBONE_FOLDER)
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
    """Read what `LengthClassifier.save` wrote. Raises `ModelUnusable`."""
    try:
        tensors = load_file(folder / HEAD_FILE)
        backbone, tokenizer = load_backbone(str(folder / BACKBONE_FOLDER))
        network = Network(backbone, len(tensors["bias"]))
        network.head.load_state_dict(
            {"weight": torch.from_numpy(tensors["weight"]), "bias": torch.from_numpy(tensors["bias"])}
        )
        low, high = (float(level) for level in tensors["levels"])
        reader = Reader(tokenizer, int(card["recipe"]["most_prompt_tokens"]))
        return LengthClassifier(place(network), reader, Buckets(tensors["edges"]), (low, high), card)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as broken:
        raise ModelUnusable(f"the length classifier in {folder} cannot be read: {broken}") from None


def load_backbone(base: str) -> tuple[Any, Any]:
    """Backbone (without any head) and tokenizer of a local folder or a hub name; code that comes with a model is not
    run.

    Raises OSError and ValueError as transformers does.
    """
    from transformers import AutoModel, AutoTokenizer

    backbone = AutoModel.from_pretrained(base, trust_remote_code=False, dtype=torch.float32)
    return backbone, AutoTokenizer.from_pretrained(base, trust_remote_code=False)


def place(network: Network) -> Network:
    """On the accelerator where there is one."""
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    return network
