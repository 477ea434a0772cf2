"""benchmarks.prompt_size: random bodies, true sizes from real tokenizers, and the page."""

from __future__ import annotations

import json

import pytest

from benchmarks.prompt_size.bodies import KINDS, make_bodies, png
from benchmarks.prompt_size.in_process import Scheduled, served
from benchmarks.prompt_size.page import page
from benchmarks.prompt_size.remote import Sample, changing, learning, study, summary
from benchmarks.prompt_size.texts import HALVES, texts
from benchmarks.prompt_size.tokenizers import counters, hermes, mistral_tokens, qwen_tokens
from gateway.api.prompt import read_chat


def test_halves_share_no_text() -> None:
    first, second = (texts(half) for half in HALVES)
    assert not set(first.prose) & set(second.prose)
    assert not set(first.code) & set(second.code)
    assert not set(sum(first.sentences.values(), ())) & set(sum(second.sentences.values(), ()))
    assert min(len(first.tools), len(first.schemas), len(second.tools), len(second.schemas)) >= 8


def test_make_bodies_is_reproducible_and_has_all_kinds() -> None:
    bodies = make_bodies(KINDS, 80, 0, seed=3)
    assert json.dumps(bodies) == json.dumps(make_bodies(KINDS, 80, 0, seed=3))
    assert json.dumps(bodies) != json.dumps(make_bodies(KINDS, 80, 0, seed=4))
    assert {kind for kind, _ in bodies} == set(KINDS)
    histories = [body for kind, body in bodies if kind == "tool history"]
    assert all(any(message["role"] == "tool" for message in body["messages"]) for body in histories)


def test_image_tokens_follow_the_models_formulas() -> None:
    assert (mistral_tokens(280, 140), mistral_tokens(3080, 1540)) == (11 * 5, 56 * 28)
    assert mistral_tokens(640, 480, patch=16, side=1024) == 41 * 30
    assert (qwen_tokens(280, 140), qwen_tokens(14, 14)) == (52, 6)


def test_mistral_tokens_match_the_library() -> None:
    images = pytest.importorskip("mistral_common.tokens.tokenizers.image")
    encoder = images.ImageEncoder(
        images.ImageConfig(image_patch_size=16, max_image_size=1024), images.SpecialImageIDs(1, 2, 3)
    )
    for width, height in ((640, 480), (1920, 1080), (300, 700)):
        columns, rows = encoder._image_to_num_tokens(_blank(width, height))
        assert mistral_tokens(width, height, patch=16, side=1024) == (columns + 1) * rows


def _blank(width: int, height: int) -> object:
    image = pytest.importorskip("PIL.Image")
    return image.new("RGB", (width, height))


def test_gateway_reads_the_size_of_the_images() -> None:
    content = read_chat(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": png(280, 140)}}]}]}
    ).content
    assert [image.patches for image in content.images] == [50.0]


def test_hermes_renders_tools_calls_results_and_schema() -> None:
    body = next(body for kind, body in make_bodies(KINDS, 80, 0, seed=3) if kind == "tool history")
    rendered = hermes(body["messages"], {**body, "response_format": {"json_schema": {"schema": {"title": "Answer"}}}})
    calls = [call for message in body["messages"] for call in message.get("tool_calls", ())]
    assert rendered.count("<tool_call>\n") == len(calls) + 1
    assert rendered.count("<tool_response>") == len(calls)
    assert all(tool["function"]["name"] in rendered for tool in body["tools"])
    assert '<schema>\n{"title": "Answer"}\n</schema>' in rendered


def _count(body: dict[str, object]) -> int:
    """Return a scripted truth: one token for each four characters."""
    return len(json.dumps(body["messages"], ensure_ascii=False)) // 4


def test_learning_lowers_the_error() -> None:
    samples = [[Sample(kind, body, _count) for kind, body in make_bodies(("CJK",), 60, half, half)] for half in HALVES]
    rows = {row["learned"]: row for row in learning("scripted", *samples) if row["kind"] == "all"}
    assert set(rows) == {0, 10, 50}
    assert rows[50]["p50"] < 0.1 < rows[0]["p50"]


def test_changing_evaluates_before_it_learns() -> None:
    samples = [Sample(kind, body, _count) for kind, body in make_bodies(("CJK",), 12, 0, 0)]
    (first, second) = changing("scripted", [samples])
    assert (first["from"], first["requests"], second["requests"]) == (0, 10, 2)
    assert first["worst"] > 0.5


def test_summary_has_quantiles_of_absolute_errors() -> None:
    assert summary([-0.4, 0.1, 0.2]) == {"requests": 3, "p50": 0.2, "p90": 0.36, "worst": 0.4, "bias": 0.1}


def test_study_and_page_cover_all_tokenizers() -> None:
    pytest.importorskip("mistral_common")
    found = study(counters(("nemo", "mistral-v3")), train=3, test=40, seed=0)
    assert {row["tokenizer"] for row in found["learning"]} == {"nemo", "mistral-v3"}
    assert all(0 <= row["p50"] <= row["p90"] <= row["worst"] for row in found["learning"])
    found["learning"] += [{**row, "learned": 50} for row in found["learning"]]
    exact = {"kind": "all", "requests": 7, "p50": 0.0, "p90": 0.0, "worst": 0.0}
    text = page(found, {"seed": 1, "flags": "x 1", "rows": [exact]})
    assert "Of 7 requests the largest error is 0.0%" in " ".join(text.split())
    assert "| all | 7 | 0.0% | 0.0% | 0.0% |" in text
    assert "python -m benchmarks.prompt_size.remote --seed 0 --json > docs/results/prompt_size.json" in text


def test_in_process_study_is_importable() -> None:
    assert callable(served)
    assert Scheduled.__doc__
