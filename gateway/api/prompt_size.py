"""Measures a prompt with the engine that a request was placed on: its size, its blocks, and whether it fits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from engine_adapter.engine import Engine, EngineState, RenderedPrompt
from gateway.api.prompt import Prompt, read_chat
from gateway.api.request_body import document_for_engine
from gateway.observability.ledger import PromptSource
from gateway.prompts.samples import sample_chats
from gateway.prompts.size_model import PromptSizes
from gateway.requests.prefix_index import TOKEN_BYTES, hash_blocks, prefix_root, prompt_bytes
from gateway.requests.request import Request

log = logging.getLogger("antares.prompts")


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
    def source(self) -> PromptSource:
        """How the size was found, for the ledger."""
        if self.rendered is not None and self.rendered.token_ids:
            return "rendered"
        return "estimated" if self.estimated else "given"

    @property
    def handle(self) -> object:
        """What the engine kept of its rendering."""
        return None if self.rendered is None else self.rendered.handle


@dataclass(slots=True)
class PromptSizer:
    """Measures prompts. Estimates, with weights learned for each model, the prompts that the engine cannot render."""

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
        # INVARIANT: this is what the engine will be sent. A prompt that is invalid is not scheduled, so the engine must
        # refuse it too.
        rendered = await engine.render(path, document_for_engine(document))
        if rendered is not None and rendered.token_ids:
            request.prompt_tokens = len(rendered.token_ids)
            _set_blocks(request, prompt_bytes(rendered), rendered.block_size * TOKEN_BYTES, document, engine.state)
            return PromptSize(rendered)
        size = self.estimate(request, prompt, document, engine.state)
        if rendered is not None and rendered.invalid:
            return PromptSize(rendered)
        if request.prompt_tokens >= engine.state.max_model_len and not request.bounds_waived:
            request.serve_at_best_effort()
        return size

    async def calibrate(self, engine: Engine) -> None:
        """Learn the tokenizer of ``engine`` from sample chats that it counts, if it can."""
        model = self.sizes.of(engine.state.model)
        if model.counts:
            return
        for chat in sample_chats():
            counted = await engine.count_tokens(chat)
            if counted is None:
                return
            if counted:
                model.learn(read_chat(chat).features, counted)
        log.info("engine %s: prompt sizes of %s calibrated", engine.name, engine.state.model)

    def learn(self, prompt: Prompt, model: str, tokens: int) -> None:
        """Learn that the engine counted ``tokens`` tokens in ``prompt``, if it was all in the body."""
        if prompt.whole:
            self.sizes.of(model).learn(prompt.features, tokens)


def _set_blocks(request: Request, data: bytes, block_bytes: int, document: dict[str, Any], state: EngineState) -> None:
    salt, model = document.get("cache_salt"), document.get("model")
    adapter = ""
    if isinstance(model, str) and model:
        # A server of any model may have several that no engine lists.
        adapter = state.adapter(state.own_name(model) or model)
    # What another engine had in its cache means nothing here.
    request.cached_tokens = request.shared_tokens = 0
    if _skips_prefix_cache(document):
        data = b""
    request.content, request.block_bytes = data, block_bytes
    request.blocks = hash_blocks(prefix_root(adapter, salt if isinstance(salt, str) else ""), data, block_bytes)
    request.block_tokens = block_bytes / max(1, len(data)) * request.prompt_tokens


def _skips_prefix_cache(document: dict[str, Any]) -> bool:
    """Whether the engine computes the whole prompt, because its log probabilities are part of the answer.

    NOTE: a hit predicted for such a request would be missed, and would count against the index.
    """
    if document.get("prompt_logprobs") is not None:
        return True
    counted = document.get("logprobs") is not None or document.get("top_logprobs") is not None
    return bool(document.get("echo")) and counted
