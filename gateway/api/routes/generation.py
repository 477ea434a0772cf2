"""The generation routes: how each reads its prompt, marks its stream and shapes its errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gateway.api.errors import bad_request
from gateway.api.prompt import MAX_SEQUENCES, Prompt, read_prompt
from gateway.api.routes import error_shape, stream_format
from gateway.api.routes.equivalent_chat import chat_of_messages, chat_of_responses
from gateway.api.routes.error_shape import ErrorShape
from gateway.api.routes.stream_format import StreamFormat


@dataclass(frozen=True, slots=True)
class GenerationRoute:
    """A route whose requests generate tokens, and are scheduled.

    Args:
        path: the exact path.
        read_prompt: returns the prompt's size, sequences and limits from a body. Raises `ApiError` 400.
        stream: the markers of its event stream.
        errors: the format of its errors.
        takes_xargs: vLLM reads ``vllm_xargs`` from its body.
    """

    path: str
    read_prompt: Callable[[dict[str, Any]], Prompt]
    stream: StreamFormat = stream_format.COMPLETIONS
    errors: ErrorShape = error_shape.OPENAI
    takes_xargs: bool = True


def _read_responses(body: dict[str, Any]) -> Prompt:
    return read_prompt(chat_of_responses(body), chat=True)


def _read_messages(body: dict[str, Any]) -> Prompt:
    return read_prompt(chat_of_messages(body), chat=True)


def _read_batch(body: dict[str, Any]) -> Prompt:
    """Read a batch of chats, each of which is one sequence. Of several prompts, the longest one is measured."""
    chats = body.get("messages")
    if not isinstance(chats, list) or not chats:
        raise bad_request("messages: must be a non-empty list of conversations.", "messages", "invalid_type")
    if len(chats) > MAX_SEQUENCES:
        raise bad_request(f"messages: at most {MAX_SEQUENCES} conversations; this one has {len(chats)}.", "messages")
    if body.get("n") not in (None, 1):
        raise bad_request("n: a batch generates one choice for each conversation. Remove `n`.", "n")
    prompts = [read_prompt({**body, "messages": chat}, chat=True) for chat in chats]
    return replace(max(prompts, key=lambda prompt: prompt.estimated_tokens), sequences=len(chats))


CHAT = GenerationRoute("/v1/chat/completions", partial(read_prompt, chat=True))
COMPLETION = GenerationRoute("/v1/completions", partial(read_prompt, chat=False))
RESPONSES = GenerationRoute("/v1/responses", _read_responses, stream_format.RESPONSES, error_shape.RESPONSES)
MESSAGES = GenerationRoute("/v1/messages", _read_messages, stream_format.MESSAGES, error_shape.ANTHROPIC)
BATCH = GenerationRoute("/v1/chat/completions/batch", _read_batch, takes_xargs=False)

GENERATION_ROUTES = (CHAT, COMPLETION, RESPONSES, MESSAGES, BATCH)
