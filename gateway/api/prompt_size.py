"""Measures a prompt with the engine that a request was placed on: its size, its blocks, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine_adapter.engine import Engine, EngineState, RenderedPrompt
from gateway.api.prompt import Prompt
from gateway.prompts.size_model import PromptSizes
from gateway.requests.prefix_index import TOKEN_BYTES, hash_blocks, prefix_root, prompt_bytes
from gateway.requests.request import Request


@dataclass(slots=True)
class PromptSize:
    """How the size of one request's prompt was found.

    Attributes:
        rendered: the prompt as the engine computes it; None if the engine cannot tell before it serves the request.
        estimated: the size is an estimate, from which `PromptSizer.learn` learns.
    """

    rendered: RenderedPrompt | None = None
    estimated: bool = False

    @property
    def invalid(self) -> bool:
        """Whether the engine will answer with an error, whatever the load is."""
        return self.rendered is not None and self.rendered.invalid

    @property
    def handle(self) -> object:
        """What the engine kept of its rendering."""
        return None if self.rendered is None else self.rendered.handle


@dataclass(slots=True)
class PromptSizer:
    """Measures prompts. Learns, for each model, the size of those that engines cannot tell."""

    sizes: PromptSizes = field(default_factory=PromptSizes)

    def estimate(self, request: Request, prompt: Prompt, document: dict[str, Any], state: EngineState) -> PromptSize:
        """Set the size and the blocks of ``request`` for an engine that cannot tell them."""
        content = prompt.content
        estimated = content.token_ids is None
        if content.token_ids is None:
            request.prompt_tokens = self.sizes.of(state.model).tokens(prompt.features)
        else:
            request.prompt_tokens = max(1, len(content.token_ids))
        data, block_bytes = content.rendered()
        _set_blocks(request, data, block_bytes, document, state)
        return PromptSize(estimated=estimated)

    async def measure(
        self, request: Request, prompt: Prompt, path: str, document: dict[str, Any], engine: Engine
    ) -> PromptSize:
        """Set the size and the blocks of ``request``, which was placed on ``engine``.

        If only an estimate says that the prompt exceeds the context length, the request is served without its bounds.
        It gets the engine's own error, or its answer if it fits: rejecting it for its SLO would hide that error.
        """
        rendered = await engine.render(path, document)
        if rendered is not None:
            if rendered.token_ids:
                request.prompt_tokens = len(rendered.token_ids)
                _set_blocks(request, prompt_bytes(rendered), rendered.block_size * TOKEN_BYTES, document, engine.state)
            return PromptSize(rendered)
        size = self.estimate(request, prompt, document, engine.state)
        if request.prompt_tokens >= engine.state.max_model_len and not request.bounds_waived:
            request.serve_at_best_effort()
        return size

    def learn(self, prompt: Prompt, model: str, tokens: int) -> None:
        """Learn that the engine counted ``tokens`` tokens in ``prompt``."""
        self.sizes.of(model).learn(prompt.features, tokens)


def _set_blocks(request: Request, data: bytes, block_bytes: int, document: dict[str, Any], state: EngineState) -> None:
    salt, model = document.get("cache_salt"), document.get("model")
    own_name = state.own_name(model) if isinstance(model, str) else None
    adapter = "" if own_name is None else state.adapter(own_name)
    request.content, request.block_bytes = data, block_bytes
    request.blocks = hash_blocks(prefix_root(adapter, salt if isinstance(salt, str) else ""), data, block_bytes)
    request.block_tokens = block_bytes / max(1, len(data)) * request.prompt_tokens
