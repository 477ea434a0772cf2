"""The models that an engine serves, as ``GET /v1/models`` lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_MODELS, MAX_NAME = 4096, 256
"""Models of one engine, and characters of a name, that are read. They bound what a server can make the gateway keep."""


@dataclass(slots=True, frozen=True)
class ModelCard:
    """One model. ``parent``: the base model of a LoRA adapter. ``max_model_len``: context length (tokens), if known."""

    id: str
    max_model_len: int | None = None
    owned_by: str = ""
    created: int = 0
    root: str | None = None
    parent: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the card in the form of the OpenAI API."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": self.owned_by,
            "root": self.root or self.id,
            "parent": self.parent,
            "max_model_len": self.max_model_len,
        }


def read_cards(listing: Any) -> list[ModelCard]:
    """Return the cards in the parsed body of ``/v1/models``. Entries without a valid name are left out.

    Raises ValueError if it is not a list of models.
    """
    data = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(data, list):
        raise ValueError("not a list of models")
    cards = [_card(entry) for entry in data[:MAX_MODELS] if isinstance(entry, dict)]
    return [card for card in cards if 0 < len(card.id) <= MAX_NAME]


def _card(entry: dict[str, Any]) -> ModelCard:
    def text(key: str) -> str:
        value = entry.get(key)
        return value if isinstance(value, str) else ""

    def number(key: str) -> int | None:
        value = entry.get(key)
        return value if isinstance(value, int) and value > 0 else None

    created = number("created") or 0
    owner = text("owned_by")[:MAX_NAME]
    return ModelCard(text("id"), number("max_model_len"), owner, created, text("root") or None, text("parent") or None)
