"""Prompts rendered ahead of scheduling, with a scripted renderer in place of vLLM's."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.vllm.rendering import PromptRenderer, Rendering, current_rendering, reuse_renderings
from tests.fixtures.stub_modules import stub_modules

CHAT, COMPLETIONS, MESSAGES, RESPONSES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
BLOCK = 16


class ErrorResponse:
    """vLLM's serving classes return one for an invalid request."""


@dataclass
class ScriptedRenderer:
    """Tokenises at one token a character, and records the options of each call."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    images: bool = False

    async def render_chat_async(self, text: str, **options: Any) -> tuple[list[str], list[dict[str, Any]]]:
        return [text], await self.render_cmpl_async(text, **options)

    async def render_cmpl_async(self, text: str, **options: Any) -> list[dict[str, Any]]:
        self.calls.append(options)
        await asyncio.sleep(0)
        engine_input: dict[str, Any] = {"prompt_token_ids": [ord(character) for character in text]}
        if self.images:
            place = SimpleNamespace(offset=2, length=3)
            engine_input |= {"mm_placeholders": {"image": [place]}, "mm_hashes": {"image": ["content"]}}
        return [engine_input]


class ChangingRequest:
    """Changes the document that it validates, as vLLM's request classes do. ``text`` is the prompt."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.text = str(document["messages"][0].pop("content"))
        self.previous_response_id = document.get("previous_response_id")
        document["messages"] = [object()]

    @classmethod
    def model_validate(cls, document: dict[str, Any]) -> ChangingRequest:
        return cls(document)


class ScriptedServing:
    """The serving classes of vLLM: a prompt "invalid" is an error, "broken" raises."""

    def __init__(self, renderer: ScriptedRenderer) -> None:
        self._renderer = renderer
        self.response_store: dict[str, Any] = {"resp_known": object()}

    async def render_chat_request(self, request: ChangingRequest) -> Any:
        self._check(request)
        return ErrorResponse() if request.text == "invalid" else await self._renderer.render_chat_async(request.text)

    async def render_completion_request(self, request: ChangingRequest) -> Any:
        self._check(request)
        return ErrorResponse() if request.text == "invalid" else await self._renderer.render_cmpl_async(request.text)

    def to_chat_completion_request(self, request: ChangingRequest, merge_inline_system: bool) -> ChangingRequest:
        assert merge_inline_system
        return request

    async def _render_resolved_response_inputs(self, request: ChangingRequest, previous: Any) -> Any:
        return await self.render_chat_request(request)

    def _check(self, request: ChangingRequest) -> None:
        if request.text == "broken":
            raise ValueError(request.text)


@pytest.fixture
def renderer() -> ScriptedRenderer:
    scripted = ScriptedRenderer()
    reuse_renderings(scripted)
    return scripted


@pytest.fixture
def prompts(renderer: ScriptedRenderer, monkeypatch: pytest.MonkeyPatch) -> PromptRenderer:
    stub_modules(
        monkeypatch,
        {
            "vllm.entrypoints.openai.chat_completion.protocol": {"ChatCompletionRequest": ChangingRequest},
            "vllm.entrypoints.openai.completion.protocol": {"CompletionRequest": ChangingRequest},
            "vllm.entrypoints.openai.responses.protocol": {"ResponsesRequest": ChangingRequest},
            "vllm.entrypoints.anthropic.protocol": {"AnthropicMessagesRequest": ChangingRequest},
            "vllm.entrypoints.serve.engine.protocol": {"ErrorResponse": ErrorResponse},
        },
    )
    serving = ScriptedServing(renderer)
    state = SimpleNamespace(
        openai_serving_chat=serving,
        openai_serving_completion=serving,
        openai_serving_responses=serving,
        anthropic_serving_messages=serving,
        serving_render=SimpleNamespace(_merge_inline_system=True),
    )
    return PromptRenderer(state, BLOCK)


def ask(text: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


async def serve(renderer: ScriptedRenderer, text: str, handle: object) -> list[int]:
    """Render as vLLM's own handler does while it serves a request, in a task of its own. Returns the tokens."""

    async def handler() -> list[int]:
        _, engine_inputs = await renderer.render_chat_async(text)
        return list(engine_inputs[0]["prompt_token_ids"])

    token = current_rendering.set(handle)  # type: ignore[arg-type]
    try:
        return await asyncio.create_task(handler())
    finally:
        current_rendering.reset(token)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
async def test_render_returns_tokens_of_every_route(prompts: PromptRenderer, path: str) -> None:
    rendered = await prompts.render(path, ask("hello"))
    assert rendered is not None
    assert (list(rendered.token_ids), rendered.block_size, rendered.invalid) == (
        [ord(c) for c in "hello"],
        BLOCK,
        False,
    )


async def test_prompt_is_rendered_once_for_scheduling_and_serving(
    prompts: PromptRenderer, renderer: ScriptedRenderer
) -> None:
    rendered = await prompts.render(CHAT, ask("hello"))
    assert rendered is not None
    assert await serve(renderer, "hello", rendered.handle) == list(rendered.token_ids)
    assert len(renderer.calls) == 1


async def test_second_serve_of_a_rendering_renders_again(prompts: PromptRenderer, renderer: ScriptedRenderer) -> None:
    """A request with several prompts, or a handler that renders twice, never gets the tokens of another prompt."""
    rendered = await prompts.render(CHAT, ask("hello"))
    assert rendered is not None
    await serve(renderer, "hello", rendered.handle)
    assert await serve(renderer, "other", rendered.handle) == [ord(c) for c in "other"]
    assert len(renderer.calls) == 2
    kept = rendered.handle
    assert isinstance(kept, Rendering)
    assert kept.result is None, "the tokens are released once they are used"


async def test_serving_without_a_rendering_renders(renderer: ScriptedRenderer) -> None:
    """Calibration, and routes that pass through."""
    assert await serve(renderer, "hello", None) == [ord(c) for c in "hello"]
    assert renderer.calls == [{}]


async def test_concurrent_requests_keep_their_own_renderings(
    prompts: PromptRenderer, renderer: ScriptedRenderer
) -> None:
    texts = [f"prompt {number}" for number in range(20)]
    rendered = await asyncio.gather(*(prompts.render(CHAT, ask(text)) for text in texts))
    served = await asyncio.gather(
        *(serve(renderer, text, one.handle) for text, one in zip(texts, rendered, strict=True) if one is not None)
    )
    assert ["".join(map(chr, token_ids)) for token_ids in served] == texts
    assert len(renderer.calls) == len(texts)


async def test_rendering_ahead_leaves_the_image_cache_alone(
    prompts: PromptRenderer, renderer: ScriptedRenderer
) -> None:
    """A request may be rejected after it was rendered. Its images then never reach the EngineCore's cache."""
    renderer.images = True
    rendered = await prompts.render(CHAT, ask("hello"))
    assert rendered is not None
    assert rendered.media == ((2, "content"),)
    assert renderer.calls == [{"skip_mm_cache": True}]
    await serve(renderer, "other", None)
    assert renderer.calls[1:] == [{}], "the next request uses the cache as usual"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
async def test_render_leaves_the_document_unchanged(prompts: PromptRenderer, path: str) -> None:
    """vLLM turns tool calls into its own objects. Sent to the engine afterwards, the document was not JSON any more."""
    document = ask("hello")
    before = copy.deepcopy(document)
    await prompts.render(path, document)
    assert document == before


@pytest.mark.parametrize("text", ["invalid", "broken"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
async def test_invalid_request_is_reported_and_not_reused(prompts: PromptRenderer, path: str, text: str) -> None:
    rendered = await prompts.render(path, ask(text))
    assert rendered is not None
    assert (rendered.invalid, rendered.token_ids, rendered.handle) == (True, (), None)
    assert current_rendering.get() is None


async def test_unknown_previous_response_is_invalid(prompts: PromptRenderer) -> None:
    known = await prompts.render(RESPONSES, {**ask("hello"), "previous_response_id": "resp_known"})
    unknown = await prompts.render(RESPONSES, {**ask("hello"), "previous_response_id": "resp_unknown"})
    assert known is not None
    assert unknown is not None
    assert (known.invalid, unknown.invalid) == (False, True)


async def test_document_too_deep_to_encode_is_invalid(prompts: PromptRenderer) -> None:
    nested: Any = []
    for _ in range(400):
        nested = [nested]
    rendered = await prompts.render(CHAT, {**ask("hello"), "metadata": nested})
    assert rendered is not None
    assert rendered.invalid


async def test_other_routes_are_not_rendered(prompts: PromptRenderer, renderer: ScriptedRenderer) -> None:
    assert await prompts.render("/v1/chat/completions/batch", ask("hello")) is None
    assert renderer.calls == []
