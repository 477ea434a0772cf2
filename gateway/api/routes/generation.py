"""The generation routes: how each reads its prompt, marks its stream and shapes its errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.api.prompt import Prompt, read_batch, read_chat, read_completion, read_messages, read_responses
from gateway.api.routes import error_shape, stream_format
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


CHAT = GenerationRoute("/v1/chat/completions", read_chat)
COMPLETION = GenerationRoute("/v1/completions", read_completion)
RESPONSES = GenerationRoute("/v1/responses", read_responses, stream_format.RESPONSES, error_shape.RESPONSES)
MESSAGES = GenerationRoute("/v1/messages", read_messages, stream_format.MESSAGES, error_shape.ANTHROPIC)
BATCH = GenerationRoute("/v1/chat/completions/batch", read_batch, takes_xargs=False)

GENERATION_ROUTES = (CHAT, COMPLETION, RESPONSES, MESSAGES, BATCH)
