"""True prompt sizes: chat templates and tokenizers of three model families that are installed with the project.

- `nemo`: the tokenizer of Mistral NeMo (tekken, byte-level BPE, 131k) and Mistral's own template with tools and calls;
  images as in Mistral Small 3.1 (patches of 28 pixels).
- `mistral-v3`: the tokenizer of Mistral 7B v0.3 (SentencePiece, 32k) and Mistral's own template; images as in LLaVA 1.5
  (576 tokens each).
- `smollm2`: the tokenizer of SmolLM2 (byte-level BPE, 49k) and ChatML with Hermes' format of tools; images as in
  Qwen2-VL (patches of 28 pixels).

Only the template of `smollm2` renders the schema of a response, as prompts for Hermes' JSON mode do. Images are counted
by the models' own formulas; the rest of the prompt is really tokenised.
"""

from __future__ import annotations

import base64
import copy
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Body = dict[str, Any]
Count = Callable[[Body], int]

LLAVA_TOKENS = 576
_QWEN_PATCH = 28
_QWEN_MIN, _QWEN_MAX = 56 * 56, 12_845_056


def mistral_tokens(width: float, height: float, patch: int = 28, side: int = 1540) -> int:
    """Return the tokens of an image in Mistral's models: one for each patch, and one at the end of each row.

    Images are scaled down to ``side`` pixels. Mistral Small 3.1 by default; Pixtral has 16 and 1024.
    """
    scale = max(width, height, side) / side
    columns, rows = (math.ceil(round(length / scale) / patch) for length in (width, height))
    return (columns + 1) * rows


def qwen_tokens(width: float, height: float) -> int:
    """Return the tokens of an image in Qwen2-VL: one for each patch of 28 pixels, within its limits on pixels."""
    scale = math.sqrt(min(max(width * height, _QWEN_MIN), _QWEN_MAX) / (width * height))
    return round(width * scale / _QWEN_PATCH) * round(height * scale / _QWEN_PATCH) + 2


def counters(names: tuple[str, ...] = ("nemo", "mistral-v3", "smollm2")) -> dict[str, Count]:
    """Return the functions that count the tokens of a body."""
    makers: dict[str, Callable[[], Count]] = {
        "nemo": lambda: _mistral("tekken_240911.json", mistral_tokens),
        "mistral-v3": lambda: _mistral(
            "mistral_instruct_tokenizer_240323.model.v3", lambda width, height: LLAVA_TOKENS
        ),
        "smollm2": _smollm2,
    }
    return {name: makers[name]() for name in names}


def _mistral(file: str, image_tokens: Callable[[float, float], int]) -> Count:
    import mistral_common
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.from_file(str(Path(mistral_common.__file__).parent / "data" / file))

    def count(body: Body) -> int:
        messages, images = _without_images(body["messages"])
        request = ChatCompletionRequest.from_openai(messages, body.get("tools"))
        return len(tokenizer.encode_chat_completion(request).tokens) + sum(image_tokens(*size) for size in images)

    return count


def _smollm2() -> Count:
    from tokenizers import Tokenizer

    from engine_adapter.vllm.smollm2 import prepare

    tokenizer = Tokenizer.from_file(str(prepare() / "tokenizer.json"))

    def count(body: Body) -> int:
        messages, images = _without_images(body["messages"])
        encoded = tokenizer.encode(hermes(messages, body), add_special_tokens=False)
        return len(encoded.ids) + sum(qwen_tokens(*size) for size in images)

    return count


def hermes(messages: list[dict[str, Any]], body: Body) -> str:
    """Return the prompt in ChatML with Hermes' format of tools, as Qwen2.5 and many fine-tuned models use it."""
    system, rest = "You are a helpful assistant.", messages
    if messages[0]["role"] == "system":
        system, rest = messages[0]["content"], messages[1:]
    if body.get("tools"):
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in body["tools"])
        system += (
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
            f"function signatures within <tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\nFor each function "
            "call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )
    if body.get("response_format"):
        schema = json.dumps(body["response_format"]["json_schema"]["schema"])
        system += f"\n\nAnswer in JSON. Here's the schema you must adhere to:\n<schema>\n{schema}\n</schema>"
    turns = [_turn("system", system)]
    for message in rest:
        text = message.get("content") or ""
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = json.dumps(json.loads(function["arguments"]), ensure_ascii=False)
            text += f'\n<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
        if message["role"] == "tool":
            turns.append(_turn("user", f"<tool_response>\n{text}\n</tool_response>"))
        else:
            turns.append(_turn(message["role"], text))
    return "".join(turns) + "<|im_start|>assistant\n"


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _without_images(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[float, float]]]:
    """Return the messages with their parts joined to text, and the width and height of their images in pixels."""
    images: list[tuple[float, float]] = []
    plain = copy.deepcopy(messages)
    for message in plain:
        if isinstance(message["content"], list):
            parts = message["content"]
            images += [_pixels(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
            message["content"] = "\n".join(part["text"] for part in parts if part["type"] == "text")
    return plain, images


def _pixels(png_url: str) -> tuple[float, float]:
    width, height = struct.unpack(">II", base64.b64decode(png_url.partition(",")[2][:32])[16:24])
    return width, height
