"""Sizes of images and audio from their first bytes."""

from __future__ import annotations

import base64
import struct

import pytest

from gateway.prompts.media import LOW_DETAIL_PATCHES, MAX_PATCHES, UNKNOWN_PATCHES, audio_seconds, read_image

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 560, 280)
GIF = b"GIF89a" + struct.pack("<HH", 56, 28)
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(10) + b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 280, 560)
WEBP_LOSSY = b"RIFF\0\0\0\0WEBPVP8 " + bytes(10) + struct.pack("<HH", 560, 280)
WEBP_EXTENDED = b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + (559).to_bytes(3, "little") + (279).to_bytes(3, "little")
WEBP_LOSSLESS = b"RIFF\0\0\0\0WEBPVP8L" + bytes(5) + (559 | 279 << 14).to_bytes(4, "little")
HUGE = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 1 << 31, 1 << 31)


def a_url(data: bytes) -> str:
    return "data:image/x;base64," + base64.b64encode(data + bytes(30)).decode()


@pytest.mark.parametrize(
    ("data", "patches"),
    [
        (PNG, 200.0),
        (GIF, 2.0),
        (JPEG, 200.0),
        (WEBP_LOSSY, 200.0),
        (WEBP_EXTENDED, 200.0),
        (WEBP_LOSSLESS, 200.0),
        (HUGE, MAX_PATCHES),
        (b"\xff\xd8\xff", UNKNOWN_PATCHES),
        (b"BM", UNKNOWN_PATCHES),
    ],
)
def test_image_patches_are_read_from_its_header(data: bytes, patches: float) -> None:
    assert read_image(a_url(data)).patches == patches


@pytest.mark.parametrize("url", ["http://x/y.png", "", "data:", "data:image/png;base64,%%%", "data:image/png;base64,é"])
def test_image_of_unknown_size_counts_as_usual(url: str) -> None:
    assert read_image(url).patches == UNKNOWN_PATCHES
    assert read_image(url, "low").patches == LOW_DETAIL_PATCHES


def test_audio_seconds_follow_the_size() -> None:
    assert audio_seconds("A" * 42_668, "wav") == pytest.approx(1.0, rel=0.01)
    assert audio_seconds("A" * 42_668, "mp3") == pytest.approx(2.0, rel=0.01)
    assert audio_seconds("A" * 42_668, {}) == audio_seconds("A" * 42_668, "mp3")
