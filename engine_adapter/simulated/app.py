"""The simulated engine's OpenAI routes. Responses have vLLM's format, including the order of chunks."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from engine_adapter.asgi import ClientDisconnected, read_body, run_until_disconnect
from engine_adapter.engine import OBSERVER_KEY, RENDERING_KEY, EngineLost, EngineUnreachable, Receive, Scope, Send
from engine_adapter.simulated.messages_api import MessagesResponse, count_tokens, read_messages
from engine_adapter.simulated.prompt import SimulatedPrompt, block_hashes, message_tokens
from engine_adapter.simulated.request import BadRequest, Completion, read_object
from engine_adapter.simulated.responses_api import ResponsesResponse, read_responses
from engine_adapter.simulated.sequence import SimulatedSequence

if TYPE_CHECKING:
    from engine_adapter.simulated.engine import SimulatedEngine

FINGERPRINT = "antares-simulated"
"""``system_fingerprint`` of every response, so that simulated output is recognisable."""
_TEXT = (
    "the engine produces fixed words for every request and no model runs behind them "
    "steps follow steps as batches fill and drain with words that mean nothing"
)
_WORDS = _TEXT.split()
_ROUTES = {
    "/health": "GET",
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
}


@dataclass(slots=True, frozen=True)
class Choice:
    """A planned sequence. ``stops``: it ends with an end-of-sequence token, which has no text.

    ``prompt``: the number of its prompt in the request. ``blocks``: hashes of the blocks of prompt and answer.
    """

    index: int
    prompt: int
    prompt_tokens: int
    output_tokens: int
    stops: bool
    seed: int
    blocks: tuple[int, ...] = ()

    def text(self, token: int) -> str:
        """Text of output token number ``token``, counted from 1."""
        if self.stops and token == self.output_tokens:
            return ""
        word = _WORDS[(self.seed + token) % len(_WORDS)]
        return word.capitalize() if token == 1 else " " + word

    def finish_reason(self, token: int) -> str | None:
        """``stop``, ``length``, or None while more tokens follow."""
        if token < self.output_tokens:
            return None
        return "stop" if self.stops else "length"


class SimulatedApp:
    """ASGI app for health, models and the generation routes. Errors have the format of the API."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises `EngineUnreachable` if the engine is down, `EngineLost` if it dies."""
        if scope["type"] != "http":
            return
        if not self._engine.state.alive:
            raise EngineUnreachable(f"the simulated engine {self._engine.name!r} is down")
        path, allowed = scope["path"], _ROUTES.get(scope["path"])
        if allowed is None:
            await _error(send, 404, "NotFoundError", f"no route {path}")
        elif scope["method"] != allowed:
            await _error(send, 405, "MethodNotAllowed", f"{path} requires {allowed}", [(b"allow", allowed.encode())])
        elif path == "/health":
            await _json(send, 200, {})
        elif path == "/v1/models":
            await _json(send, 200, self._models())
        else:
            await self._complete(scope, receive, send)

    def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [card.document() for card in (self._engine.state.models or {}).values()]}

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            document = read_object(await read_body(receive))
            if path == "/v1/messages/count_tokens":
                await _json(send, 200, count_tokens(document))
                return
            # Only chats and text completions are rendered.
            prompts = scope.get(RENDERING_KEY)
            request = _READERS[path](document) if prompts is None else _READERS[path](document, prompts=prompts)
            choices = self._choices(request)
        except ClientDisconnected:
            return
        except BadRequest as error:
            if path.startswith("/v1/messages"):
                details = {"type": "BadRequestError", "message": str(error)}
                await _json(send, 400, {"type": "error", "error": details})
            else:
                await _error(send, 400, "BadRequestError", str(error), param=error.param)
            return
        model = request.model if request.model in (self._engine.state.models or {}) else self._engine.model
        response = _RESPONSES.get(path, _Response)(request, choices, model)
        await run_until_disconnect(self._generate(scope, response, send), receive)

    def _choices(self, request: Completion) -> list[Choice]:
        """Plan the request's sequences. Raises `BadRequest` if the context is too long."""
        max_context = min(self._engine.state.max_model_len, self._engine.state.kv_tokens)
        choices: list[Choice] = []
        for number, prompt in enumerate(request.prompts):
            text, prompt_tokens = prompt.text, prompt.size
            _check_context(max_context, prompt_tokens, request.max_tokens or 0)
            limit = request.max_tokens or max_context - prompt_tokens
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
            # Output tokens up to the end-of-sequence token, before the limit applies.
            eos_at = request.fixed_output or self._default_length(text, seed)
            if request.ignore_eos and request.max_tokens and not request.fixed_output:
                eos_at = limit + 1
            for _ in range(request.n):
                index = len(choices)
                length, stops = min(eos_at, limit), eos_at <= limit
                choice = Choice(index, number, prompt_tokens, length, stops, seed=seed + 7 * index)
                choices.append(replace(choice, blocks=self._blocks(request, prompt, choice)))
        return choices

    def _blocks(self, request: Completion, prompt: SimulatedPrompt, choice: Choice) -> tuple[int, ...]:
        """Return the hashes of the blocks of a prompt and its answer, as the next turn of a chat will repeat it."""
        if not self._engine.state.prefix_caching:
            return ()
        tokens = list(prompt.tokens)
        if request.chat:
            words = [choice.text(token).strip() for token in range(1, choice.output_tokens + 1 - choice.stops)]
            tokens += message_tokens("assistant", words)
        return block_hashes((request.model or self._engine.model, request.cache_salt), tokens)

    def _default_length(self, text: str, seed: int) -> int:
        default = self._engine.output_tokens
        if default is None:
            return 8 + seed % 121
        return max(1, default(text) if callable(default) else default)

    async def _generate(self, scope: Scope, response: AnyResponse, send: Send) -> None:
        request, choices = response.request, response.choices
        observer = scope.get(OBSERVER_KEY)
        # Items are (choice, tokens generated so far), or None if the engine died.
        produced: asyncio.Queue[tuple[Choice, int] | None] = asyncio.Queue()

        def on_token(choice: Choice, generated: int, at: float) -> None:
            if observer is not None:
                observer.on_tokens(str(choice.index), 1, at)
            produced.put_nowait((choice, generated))

        def on_cached(choice: Choice, tokens: int) -> None:
            request.cached_tokens.setdefault(choice.prompt, tokens)
            if observer is not None:
                observer.on_cached(str(choice.index), tokens)

        def on_lost() -> None:
            produced.put_nowait(None)

        sequences = [
            SimulatedSequence(
                request_id=f"{response.id}-{choice.index}",
                prompt_tokens=choice.prompt_tokens,
                output_tokens=choice.output_tokens,
                pace_s=request.pace_s,
                kind=request.kind,
                gate=request.gate,
                on_token=partial(on_token, choice),
                on_lost=on_lost,
                on_cached=partial(on_cached, choice),
                blocks=choice.blocks,
            )
            for choice in choices
        ]
        if observer is not None:
            for choice in choices:
                observer.on_prompt(str(choice.index), choice.prompt_tokens)
        self._engine.submit(sequences)
        try:
            await (self._stream if request.stream else self._collect)(response, produced, send)
        finally:
            self._engine.abandon(sequences)

    async def _stream(
        self, response: AnyResponse, produced: asyncio.Queue[tuple[Choice, int] | None], send: Send
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _events(send, response.opening())
        unfinished, started = len(response.choices), False
        while unfinished:
            choice, token = self._unless_lost(await produced.get())
            if not started:
                started = True
                await _events(send, response.first_token())
            unfinished -= token == choice.output_tokens
            await _events(send, response.token(choice, token))
        await _events(send, response.closing())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _collect(
        self, response: AnyResponse, produced: asyncio.Queue[tuple[Choice, int] | None], send: Send
    ) -> None:
        unfinished = len(response.choices)
        while unfinished:
            choice, token = self._unless_lost(await produced.get())
            unfinished -= token == choice.output_tokens
        await _json(send, 200, response.body())

    def _unless_lost(self, item: tuple[Choice, int] | None) -> tuple[Choice, int]:
        if item is None:
            raise EngineLost(f"the simulated engine {self._engine.name!r} died during this request")
        return item


class _Response:
    """The JSON of one response, as one body or in chunks."""

    def __init__(self, request: Completion, choices: list[Choice], model: str) -> None:
        self.id = ("chatcmpl-" if request.chat else "cmpl-") + uuid.uuid4().hex
        self.request = request
        self.choices = choices
        self._head = {
            "id": self.id,
            "object": "chat.completion.chunk" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def opening(self) -> bytes:
        """Events before the engine takes the request."""
        return b""

    def first_token(self) -> bytes:
        """Events that precede the first token."""
        return b"".join(self._role_chunk(choice) for choice in self.choices) if self.request.chat else b""

    def token(self, choice: Choice, token: int) -> bytes:
        """The event of one token."""
        text = choice.text(token)
        finish = {"logprobs": None, "finish_reason": choice.finish_reason(token), "stop_reason": None}
        output: dict[str, Any] = {"delta": {"content": text}} if self.request.chat else {"text": text}
        return self._chunk({"index": choice.index} | output | finish)

    def closing(self) -> bytes:
        """Events after the last token."""
        usage = _data(self._head | {"choices": [], "usage": self._usage()}) if self.request.include_usage else b""
        return usage + b"data: [DONE]\n\n"

    def body(self) -> dict[str, Any]:
        choices = [self._complete_choice(choice) for choice in self.choices]
        head = self._head | {"object": "chat.completion"} if self.request.chat else self._head
        return head | {"choices": choices, "usage": self._usage()}

    def _complete_choice(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text(token) for token in range(1, choice.output_tokens + 1))
        reason = choice.finish_reason(choice.output_tokens)
        finish = {"logprobs": None, "finish_reason": reason, "stop_reason": None}
        if not self.request.chat:
            return {"index": choice.index, "text": text} | finish
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice.index, "message": message} | finish

    def _role_chunk(self, choice: Choice) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return _data(self._head | {"choices": [choice]})

    def _usage(self) -> dict[str, Any]:
        prompt = sum(prompt.size for prompt in self.request.prompts)
        completion = sum(choice.output_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.request.cached_tokens.values())},
        }


AnyResponse = _Response | ResponsesResponse | MessagesResponse

_READERS: dict[str, Callable[..., Completion]] = {
    "/v1/chat/completions": partial(Completion.of, chat=True),
    "/v1/completions": partial(Completion.of, chat=False),
    "/v1/responses": read_responses,
    "/v1/messages": read_messages,
}
_RESPONSES: dict[str, Callable[[Completion, list[Choice], str], AnyResponse]] = {
    "/v1/responses": ResponsesResponse,
    "/v1/messages": MessagesResponse,
}


def _check_context(max_context: int, prompt_tokens: int, output_tokens: int) -> None:
    """Raise vLLM's error if a prompt and its requested output exceed the context length."""
    limit = f"This model's maximum context length is {max_context} tokens. However, "
    value = f"(parameter=input_tokens, value={prompt_tokens})"
    if prompt_tokens + 1 > max_context:
        raise BadRequest(
            f"{limit}your prompt contains {prompt_tokens} input tokens, which exceeds this limit even without any "
            f"output tokens. Please reduce the length of the input prompt. {value}",
            "input_tokens",
        )
    if prompt_tokens + output_tokens > max_context:
        raise BadRequest(
            f"{limit}you requested {output_tokens} output tokens and your prompt contains {prompt_tokens} input "
            f"tokens, for a total of {prompt_tokens + output_tokens} tokens. Please reduce the length of the input "
            f"prompt or the number of requested output tokens. {value}",
            "input_tokens",
        )


def _data(chunk: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(chunk)


async def _events(send: Send, events: bytes) -> None:
    """Send each event in a message of its own, as vLLM's app does."""
    for event in events.split(b"\n\n")[:-1]:
        await send({"type": "http.response.body", "body": event + b"\n\n", "more_body": True})


async def _json(
    send: Send, status: int, body: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    raw = orjson.dumps(body)
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw)), *(headers or ())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": raw, "more_body": False})


async def _error(
    send: Send,
    status: int,
    kind: str,
    message: str,
    headers: list[tuple[bytes, bytes]] | None = None,
    param: str | None = None,
) -> None:
    error = {"message": message, "type": kind, "param": param, "code": status}
    await _json(send, status, {"error": error}, headers)
