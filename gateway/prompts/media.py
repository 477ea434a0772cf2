"""Sizes of images and audio in a request, from their first bytes. Nothing is decoded or downloaded."""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass

PATCH_PIXELS = 28 * 28
"""Pixels for one token of an image, as in Qwen-VL; other models are learned as a multiple."""

UNKNOWN_PATCHES = 1000.0
"""Patches of an image whose size is not in the request: about one megapixel is usual."""

LOW_DETAIL_PATCHES = 85.0
"""Patches at ``detail: low``: OpenAI's own price of such an image in tokens."""

LARGE_IMAGE_PATCHES = 1024.0
"""Patches of an image (0.8 megapixels) up to which models count all pixels. Larger ones are scaled down."""

MAX_PATCHES = 16_384.0
"""Bounds what a forged header can claim. Servers scale larger images down."""

TOKENS_PER_AUDIO_S = 25.0
"""Tokens of a second of audio, as in Qwen-Audio and Whisper's encoder after pooling; learned where it differs."""

_HEADER_CHARS = 4096
"""Base64 characters of a file that are read. A JPEG with large metadata has its size later; it counts as unknown."""

_BYTES_PER_AUDIO_S = {"wav": 32_000.0}
_BYTES_PER_COMPRESSED_S = 16_000.0
"""Bytes of a second of audio: 16 kHz with 16 bits, or compressed at 128 kbit/s."""


@dataclass(slots=True, frozen=True)
class Image:
    """An image. ``source``: its URL or data, by which it is recognised. ``patches``: its size in `PATCH_PIXELS`."""

    source: str
    patches: float


def read_image(url: str, detail: object = None) -> Image:
    """Return the image at ``url``; its size is known only for a data URL."""
    if detail == "low":
        return Image(url, LOW_DETAIL_PATCHES)
    size = _size(_first_bytes(url.partition(",")[2])) if url.startswith("data:") else None
    if size is None:
        return Image(url, UNKNOWN_PATCHES)
    return Image(url, min(max(1.0, size[0] * size[1] / PATCH_PIXELS), MAX_PATCHES))


def audio_seconds(data: str, file_format: object) -> float:
    """Return the approximate seconds of base64 audio, from its size."""
    per_s = _BYTES_PER_AUDIO_S.get(file_format, _BYTES_PER_COMPRESSED_S) if isinstance(file_format, str) else 0.0
    return len(data) * 3 / 4 / (per_s or _BYTES_PER_COMPRESSED_S)


def _first_bytes(data: str) -> bytes:
    try:
        return base64.b64decode(data[: min(_HEADER_CHARS, len(data) // 4 * 4)])
    except (binascii.Error, ValueError):
        return b""


def _size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels of a PNG, GIF, WebP or JPEG file that starts with ``data``."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return struct.unpack(">II", data[16:24])
        if data.startswith((b"GIF87a", b"GIF89a")):
            return struct.unpack("<HH", data[6:10])
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp_size(data)
        if data.startswith(b"\xff\xd8"):
            return _jpeg_size(data)
    except (struct.error, IndexError):
        pass
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        # SOF0 to SOF15 hold the size; C4, C8 and CC have other meanings.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + max(length, 2)
    return None
