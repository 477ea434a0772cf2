"""One scheduled request on its way through the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gateway.api.http_request import HttpRequest
from gateway.api.prompt import Prompt
from gateway.api.prompt_size import PromptSize
from gateway.api.routes.generation import GenerationRoute
from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue


@dataclass(slots=True, eq=False)
class Call:
    """A scheduled request on its way through the pipeline.

    ``engine_queue``: that of the engine that it was last judged with. ``output_tokens``: the length that the client
    expects. ``unsent``: attempts in which an engine was unreachable. ``received_s``: when the body was complete.
    ``suspects``: engines that are to blame if another engine serves the request, with reason and time of the attempt.
    ``reserved_tokens``: of the tenant's tokens per minute, ``reserved_prompt_tokens`` of them for the prompts.
    """

    http: HttpRequest
    route: GenerationRoute
    document: dict[str, Any]
    prompt: Prompt
    request: Request
    size: PromptSize
    output_tokens: int | None = None
    engine_queue: EngineQueue | None = None
    unsent: int = 0
    received_s: float | None = None
    suspects: list[tuple[EngineQueue, str, float]] = field(default_factory=list)
    reserved_tokens: float = 0.0
    reserved_prompt_tokens: int = 0
