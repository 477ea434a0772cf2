"""The pictures in docs/images: complete, of the sizes that the pages expect, without external assets."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.fixtures import screenshots

IMAGES = Path(__file__).resolve().parents[3] / "docs" / "images"


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("dashboard.png", screenshots.WIDTH),
        ("dashboard-dark.png", screenshots.WIDTH),
        ("dashboard-phone.png", 3 * screenshots.PHONE_WIDTH + 2 * screenshots.GAP),
    ],
)
def test_picture_has_the_width_of_its_device(name: str, width: int) -> None:
    content = (IMAGES / name).read_bytes()
    assert struct.unpack(">I", content[16:20])[0] == width
    assert len(content) < 400_000


def test_capture_of_top_shows_every_part_without_external_assets() -> None:
    svg = (IMAGES / "top.svg").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", svg).replace("&#160;", " ")
    for part in ("Antares", "adherence", *screenshots.CLASSES, "sim-a", "sim-b", "Not attained", *screenshots.TENANTS):
        assert part in text, part
    assert re.findall(r"https?://(?!www\.w3\.org)(?!www\.textualize\.io)\S+", svg) == []
