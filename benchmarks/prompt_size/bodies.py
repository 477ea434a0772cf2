"""Random bodies of chat requests for each kind of traffic, as clients send them."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from benchmarks.prompt_size.texts import EAST_ASIAN, OTHER_LANGUAGES, Texts, texts

Body = dict[str, Any]

_IMAGE_SIZES = ((256, 256), (512, 512), (640, 480), (1024, 768), (1280, 720), (800, 1200), (1920, 1080))
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a coding agent. Use the tools to read and change files, and answer in short sentences.",
    "Answer in the language of the user. If you are not sure, say so.",
)


def make_bodies(kinds: tuple[str, ...], number: int, half: int, seed: int) -> list[tuple[str, Body]]:
    """Return ``number`` bodies with their kinds, which take turns at random, from the texts of ``half``."""
    rng, sources = random.Random(seed), texts(half)
    return [(kind, _MAKERS[kind](rng, sources)) for kind in rng.choices(kinds, k=number)]


def png(width: int, height: int) -> str:
    """Return a black image as a data URL."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" * (width + 1)) * height)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()


def _chat(rng: random.Random, sources: Texts) -> Body:
    messages = _system(rng)
    for _ in range(rng.randint(0, 4)):
        messages += [_user(sources.piece(rng, sources.prose, 400)), _assistant(sources.piece(rng, sources.prose, 1500))]
    return {"messages": [*messages, _user(sources.piece(rng, sources.prose, 1500))]}


def _code(rng: random.Random, sources: Texts) -> Body:
    pasted = "\n\n".join(f"```python\n{sources.piece(rng, sources.code, 4000)}\n```" for _ in range(rng.randint(1, 3)))
    return {"messages": [*_system(rng), _user(f"Why does this fail?\n\n{pasted}")]}


def _tools(rng: random.Random, sources: Texts) -> Body:
    return {
        "messages": [*_system(rng), _user(sources.piece(rng, sources.prose, 600))],
        "tools": _some_tools(rng, sources),
    }


def _tool_history(rng: random.Random, sources: Texts) -> Body:
    """Return an agent's request: tools, then rounds of calls (often several at once) and their results."""
    tools = _some_tools(rng, sources)
    messages = [*_system(rng), _user(sources.piece(rng, sources.prose, 400))]
    for _ in range(rng.randint(1, 8)):
        calls = [_call(rng, sources, tools) for _ in range(rng.choice((1, 1, 2, 3)))]
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": _result(rng, sources)} for call in calls]
    return {"messages": messages, "tools": tools}


def _east_asian(rng: random.Random, sources: Texts) -> Body:
    return _conversation(rng, sources, EAST_ASIAN)


def _languages(rng: random.Random, sources: Texts) -> Body:
    return _conversation(rng, sources, OTHER_LANGUAGES)


def _schema_text(rng: random.Random, sources: Texts) -> Body:
    schema = json.dumps(rng.choice(sources.schemas), indent=rng.choice((None, 2)))
    text = f"{sources.piece(rng, sources.prose, 800)}\n\nAnswer as JSON of this schema:\n{schema}"
    return {"messages": [*_system(rng), _user(text)]}


def _response_format(rng: random.Random, sources: Texts) -> Body:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": rng.choice(sources.schemas)}}
    return {"messages": [*_system(rng), _user(sources.piece(rng, sources.prose, 2000))], "response_format": form}


def _images(rng: random.Random, sources: Texts) -> Body:
    parts: list[dict[str, Any]] = [{"type": "text", "text": sources.piece(rng, sources.prose, 400)}]
    sizes = rng.choices(_IMAGE_SIZES, k=rng.choice((1, 1, 1, 2, 4)))
    parts += [{"type": "image_url", "image_url": {"url": png(*size)}} for size in sizes]
    return {"messages": [*_system(rng), {"role": "user", "content": parts}]}


_MAKERS: dict[str, Callable[[random.Random, Texts], Body]] = {
    "chat": _chat,
    "code": _code,
    "tools": _tools,
    "tool history": _tool_history,
    "CJK": _east_asian,
    "other languages": _languages,
    "schema in the text": _schema_text,
    "response schema": _response_format,
    "images": _images,
}
KINDS = tuple(_MAKERS)


def _system(rng: random.Random) -> list[dict[str, Any]]:
    return [{"role": "system", "content": rng.choice(_SYSTEMS)}] if rng.random() < 0.7 else []


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _conversation(rng: random.Random, sources: Texts, languages: tuple[str, ...]) -> Body:
    messages = _system(rng)
    for _ in range(rng.randint(0, 3)):
        messages += [_user(sources.paragraph(rng, languages)), _assistant(sources.paragraph(rng, languages))]
    return {"messages": [*messages, _user(sources.paragraph(rng, languages))]}


def _some_tools(rng: random.Random, sources: Texts) -> list[dict[str, Any]]:
    tools = rng.sample(sources.tools, rng.randint(1, 8))
    for schema in rng.sample(sources.schemas, rng.randint(0, 3)):
        name = str(schema.get("title", "tool"))[:60]
        description = str(schema.get("description", ""))[:600]
        tools.append({"type": "function", "function": {"name": name, "description": description, "parameters": schema}})
    return tools


def _call(rng: random.Random, sources: Texts, tools: list[dict[str, Any]]) -> dict[str, Any]:
    function = rng.choice(tools)["function"]
    names = list(function["parameters"].get("properties", {"path": None}))[:4]
    arguments = {name: _argument(rng, sources) for name in names}
    call_id = "".join(rng.choices("abcdefghijkmnpqrstuvwxyz0123456789", k=9))
    call = {"name": function["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": call}


def _argument(rng: random.Random, sources: Texts) -> Any:
    return rng.choice(
        (
            f"src/{rng.choice(('app', 'core', 'tests'))}/module_{rng.randrange(100)}.py",
            rng.randrange(100_000),
            rng.random() < 0.5,
            sources.piece(rng, sources.code, 300),
            sources.piece(rng, sources.prose, 80),
        )
    )


def _result(rng: random.Random, sources: Texts) -> str:
    """Return what a tool printed: a file, JSON, a listing, or a log."""
    lines = range(rng.randint(2, 25))
    kind = rng.randrange(4)
    if kind == 0:
        return sources.piece(rng, sources.code, 2500)
    if kind == 1:
        rows = [
            {"id": rng.randrange(10**6), "ok": rng.random() < 0.9, "ms": round(rng.random() * 900, 2)} for _ in lines
        ]
        return json.dumps({"rows": rows, "next": None})
    if kind == 2:
        sizes = ((rng.randrange(90_000), rng.randint(1, 28), rng.randrange(300)) for _ in lines)
        return "\n".join(f"-rw-r--r-- 1 app app {size:>6} Nov {day:>2} module_{n}.py" for size, day, n in sizes)
    events = ((rng.randrange(24), rng.randrange(60), rng.randrange(8), rng.randrange(2000)) for _ in lines)
    return "\n".join(
        f"2026-11-28T{hour:02d}:{minute:02d}:07Z INFO worker-{n} took {ms} ms" for hour, minute, n, ms in events
    )
