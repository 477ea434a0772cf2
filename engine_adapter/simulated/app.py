"""The simulated engine's OpenAI routes. Responses have vLLM's format, including the order of chunks."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from engine_adapter.asgi import ClientDisconnected, read_body, run_until_disconnect
from engine_adapter.engine import OBSERVER_KEY, EngineLost, EngineUnreachable, Receive, Scope, Send
from engine_adapter.simulated.request import BadRequest, Completion
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
}


@dataclass(slots=True, frozen=True)
class _Choice:
    """A planned sequence. ``stops``: it ends with an end-of-sequence token, which has no text."""

    index: int
    prompt_tokens: int
    output_tokens: int
    stops: bool
    seed: int

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
    """ASGI app for health, models, chat completions and completions. Errors have OpenAI's format."""

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
            await self._complete(scope, receive, send, chat=path == "/v1/chat/completions")

    def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [card.document() for card in (self._engine.state.models or {}).values()]}

    async def _complete(self, scope: Scope, receive: Receive, send: Send, chat: bool) -> None:
        try:
            request = Completion.parse(await read_body(receive), chat)
            choices = self._choices(request)
        except ClientDisconnected:
            return
        except BadRequest as error:
            await _error(send, 400, "BadRequestError", str(error))
            return
        await run_until_disconnect(self._generate(scope, request, choices, send), receive)

    def _choices(self, request: Completion) -> list[_Choice]:
        """Plan the request's sequences. Raises `BadRequest` if the context is too long."""
        max_context = min(self._engine.state.max_model_len, self._engine.state.kv_tokens)
        choices: list[_Choice] = []
        for text, prompt_tokens in request.prompts:
            requested = request.max_tokens or 0
            if prompt_tokens + max(requested, 1) > max_context:
                raise BadRequest(
                    f"This model's maximum context length is {max_context} tokens. However, you requested {requested} "
                    f"output tokens and your prompt contains {prompt_tokens} input tokens. "
                    "Please reduce the length of the input prompt or the number of requested output tokens."
                )
            limit = request.max_tokens or max_context - prompt_tokens
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
            # Output tokens up to the end-of-sequence token, before the limit applies.
            eos_at = request.fixed_output or self._default_length(text, seed)
            if request.ignore_eos and request.max_tokens and not request.fixed_output:
                eos_at = limit + 1
            for _ in range(request.n):
                index = len(choices)
                choices.append(
                    _Choice(index, prompt_tokens, min(eos_at, limit), eos_at <= limit, seed=seed + 7 * index)
                )
        return choices

    def _default_length(self, text: str, seed: int) -> int:
        default = self._engine.output_tokens
        if default is None:
            return 8 + seed % 121
        return max(1, default(text) if callable(default) else default)

    async def _generate(self, scope: Scope, request: Completion, choices: list[_Choice], send: Send) -> None:
        observer = scope.get(OBSERVER_KEY)
        # Items are (choice, tokens generated so far), or None if the engine died.
        produced: asyncio.Queue[tuple[_Choice, int] | None] = asyncio.Queue()

        def on_token(choice: _Choice, generated: int, at: float) -> None:
            if observer is not None:
                observer.on_tokens(str(choice.index), 1, at)
            produced.put_nowait((choice, generated))

        def on_lost() -> None:
            produced.put_nowait(None)

        models = self._engine.state.models or {}
        response = _Response(request, choices, request.model if request.model in models else self._engine.model)
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
        self, response: _Response, produced: asyncio.Queue[tuple[_Choice, int] | None], send: Send
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        unfinished, roles_sent = len(response.choices), False
        while unfinished:
            choice, token = self._unless_lost(await produced.get())
            if response.request.chat and not roles_sent:
                roles_sent = True
                for other in response.choices:
                    await _event(send, response.role_chunk(other))
            unfinished -= token == choice.output_tokens
            await _event(send, response.token_chunk(choice, token))
        if response.request.include_usage:
            await _event(send, response.usage_chunk())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _collect(
        self, response: _Response, produced: asyncio.Queue[tuple[_Choice, int] | None], send: Send
    ) -> None:
        unfinished = len(response.choices)
        while unfinished:
            choice, token = self._unless_lost(await produced.get())
            unfinished -= token == choice.output_tokens
        await _json(send, 200, response.body())

    def _unless_lost(self, item: tuple[_Choice, int] | None) -> tuple[_Choice, int]:
        if item is None:
            raise EngineLost(f"the simulated engine {self._engine.name!r} died during this request")
        return item


class _Response:
    """The JSON of one response, as one body or in chunks."""

    def __init__(self, request: Completion, choices: list[_Choice], model: str) -> None:
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

    def role_chunk(self, choice: _Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})

    def token_chunk(self, choice: _Choice, token: int) -> dict[str, Any]:
        text = choice.text(token)
        finish = {"logprobs": None, "finish_reason": choice.finish_reason(token), "stop_reason": None}
        output: dict[str, Any] = {"delta": {"content": text}} if self.request.chat else {"text": text}
        return self._chunk({"index": choice.index} | output | finish)

    def usage_chunk(self) -> dict[str, Any]:
        return self._head | {"choices": [], "usage": self._usage()}

    def body(self) -> dict[str, Any]:
        choices = [self._complete_choice(choice) for choice in self.choices]
        head = self._head | {"object": "chat.completion"} if self.request.chat else self._head
        return head | {"choices": choices, "usage": self._usage()}

    def _complete_choice(self, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text(token) for token in range(1, choice.output_tokens + 1))
        reason = choice.finish_reason(choice.output_tokens)
        finish = {"logprobs": None, "finish_reason": reason, "stop_reason": None}
        if not self.request.chat:
            return {"index": choice.index, "text": text} | finish
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice.index, "message": message} | finish

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head | {"choices": [choice]}

    def _usage(self) -> dict[str, int]:
        prompt = sum(tokens for _, tokens in self.request.prompts)
        completion = sum(choice.output_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


async def _event(send: Send, chunk: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": b"data: %b\n\n" % orjson.dumps(chunk), "more_body": True})


async def _json(
    send: Send, status: int, body: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    raw = orjson.dumps(body)
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw)), *(headers or ())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": raw, "more_body": False})


async def _error(
    send: Send, status: int, kind: str, message: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    error = {"message": message, "type": kind, "param": None, "code": status}
    await _json(send, status, {"error": error}, headers)
