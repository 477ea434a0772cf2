"""Has vLLM render a prompt before the request is scheduled, and reuses the tokens when the request is served.

vLLM's serving classes turn a body into token ids with their renderer: chat template, tools, images. `PromptRenderer`
calls them with the same body ahead of time. A hook on the renderer keeps the result and returns it to vLLM's own
handler later, so that no prompt is tokenised twice.
"""

from __future__ import annotations

import contextvars
import logging
from dataclasses import dataclass
from typing import Any

import orjson

from engine_adapter.asgi import encode_json
from engine_adapter.engine import RenderedPrompt

log = logging.getLogger("antares.engine.vllm")


@dataclass(slots=True, eq=False)
class Rendering:
    """The result of one call of vLLM's renderer: empty, then kept, then used by the handler."""

    result: Any = None
    rendered: bool = False
    used: bool = False


current_rendering: contextvars.ContextVar[Rendering | None] = contextvars.ContextVar("antares_rendering", default=None)
"""The rendering of the current request. vLLM's handlers run in tasks that inherit this context."""


def reuse_renderings(renderer: Any) -> None:
    """Hook ``renderer``, vLLM's `BaseRenderer`: a request renders its prompt once."""
    for name in ("render_chat_async", "render_cmpl_async"):
        setattr(renderer, name, _reusing(getattr(renderer, name)))


def _reusing(render: Any) -> Any:
    async def reusing(*args: Any, **kwargs: Any) -> Any:
        kept = current_rendering.get()
        if kept is None or kept.used:
            return await render(*args, **kwargs)
        if kept.rendered:
            kept.used = True
            result, kept.result = kept.result, None
            return result
        # NOTE: vLLM's processor cache for images must stay in step with that of its EngineCore. A request that is
        # rejected never reaches the EngineCore, so its rendering must not touch the cache.
        kwargs["skip_mm_cache"] = True
        kept.result, kept.rendered = await render(*args, **kwargs), True
        return kept.result

    return reusing


class PromptRenderer:
    """Renders the prompts of one vLLM app. ``state``: the state of vLLM's OpenAI app; ``block_size``: in tokens."""

    def __init__(self, state: Any, block_size: int) -> None:
        self._state = state
        self._block_size = block_size
        self._by_path = {
            "/v1/chat/completions": self._render_chat,
            "/v1/completions": self._render_completion,
            "/v1/messages": self._render_messages,
            "/v1/responses": self._render_responses,
        }

    async def render(self, path: str, document: dict[str, Any]) -> RenderedPrompt | None:
        """Return the prompt of ``document``, sent to ``path``; None for a path whose prompts are not rendered ahead.

        An invalid body gives `RenderedPrompt.invalid`: vLLM will answer it with an error.
        """
        render = self._by_path.get(path)
        if render is None:
            return None
        kept = Rendering()
        token = current_rendering.set(kept)
        try:
            # NOTE: vLLM's request classes change what they validate, for example tool calls into objects of their own.
            # The gateway still sends the document to an engine, so they get a copy. This copies faster than deepcopy.
            valid = await render(orjson.loads(encode_json(document)))
        except Exception as error:
            # NOTE: the message quotes the request. vLLM's handler raises the same again and turns it into a response.
            log.debug("a prompt was not rendered: %s", type(error).__name__)
            valid = False
        finally:
            current_rendering.reset(token)
        if not valid or not kept.rendered:
            return RenderedPrompt((), 0, invalid=not valid)
        engine_inputs = kept.result[1] if path != "/v1/completions" else kept.result
        longest = max(engine_inputs, key=lambda one: len(_token_ids(one)))
        return RenderedPrompt(_token_ids(longest), self._block_size, media=_media(longest), handle=kept)

    async def _render_chat(self, document: dict[str, Any]) -> bool:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest.model_validate(document)
        return _is_valid(await self._state.openai_serving_chat.render_chat_request(request))

    async def _render_messages(self, document: dict[str, Any]) -> bool:
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

        serving = self._state.anthropic_serving_messages
        request = serving.to_chat_completion_request(
            AnthropicMessagesRequest.model_validate(document),
            merge_inline_system=self._state.serving_render._merge_inline_system,
        )
        return _is_valid(await serving.render_chat_request(request))

    async def _render_completion(self, document: dict[str, Any]) -> bool:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        request = CompletionRequest.model_validate(document)
        return _is_valid(await self._state.openai_serving_completion.render_completion_request(request))

    async def _render_responses(self, document: dict[str, Any]) -> bool:
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        serving, request = self._state.openai_serving_responses, ResponsesRequest.model_validate(document)
        previous = None
        if request.previous_response_id is not None:
            previous = serving.response_store.get(request.previous_response_id)
            if previous is None:
                return False
        return _is_valid(await serving._render_resolved_response_inputs(request, previous))


def _is_valid(result: Any) -> bool:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    return not isinstance(result, ErrorResponse)


def _token_ids(engine_input: Any) -> list[int]:
    return engine_input.get("prompt_token_ids") or []


def _media(engine_input: Any) -> tuple[tuple[int, str], ...]:
    """Return the position and the content hash of each image, video or audio piece."""
    placeholders, hashes = engine_input.get("mm_placeholders") or {}, engine_input.get("mm_hashes") or {}
    return tuple(
        (int(place.offset), str(content))
        for kind, places in placeholders.items()
        for place, content in zip(places, hashes.get(kind, ()), strict=False)
    )
