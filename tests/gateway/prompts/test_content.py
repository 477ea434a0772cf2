"""`PromptContent`: character counts, and blocks that equal prompts share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prompts.content import BLOCK_BYTES, Feature, Part, PromptContent, text_features
from gateway.prompts.media import Image
from gateway.prompts.reader import read_message
from gateway.requests.prefix_index import hash_blocks


def blocks_of(content: PromptContent, root: int = 0) -> tuple[int, ...]:
    return hash_blocks(root, *content.rendered())


def a_prompt(*texts: str) -> PromptContent:
    content = PromptContent()
    for text in texts:
        content.add_message("user")
        content.add_text(text)
    return content


def test_text_features_count_characters_and_runs() -> None:
    features = text_features("Ab 12  é漢字!!\n".encode())
    #           lower upper digit space line punctuation accented greek hebrew kana han hangul other
    characters = [1, 1, 2, 3, 1, 2, 1, 0, 0, 0, 2, 0, 0]
    runs = [1, 1, 1, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0]
    assert features == characters + runs
    assert text_features(b"") == [0] * 26


@pytest.mark.parametrize(
    ("text", "kind"),
    [("éü", 6), ("αЖя", 7), ("שلغ", 8), ("ひらカナ、。", 9), ("漢字", 10), ("한국", 11), ("ไทยहि€🙂", 12)],
)
def test_text_features_distinguish_scripts(text: str, kind: int) -> None:
    assert text_features(text.encode())[kind] == len(text)


@given(st.text(min_size=1, max_size=30))
def test_text_features_of_a_long_text_are_those_of_its_repetitions(text: str) -> None:
    data = b"\n" + text.encode("utf-8", "surrogatepass") + b"\n"
    once, often = text_features(data), text_features(data * 500)
    assert often[:13] == [500 * count for count in once[:13]]
    joined = 499 if text.strip("\t\r\n") else 500 * once[17] - 1
    assert often[13:] == [500 * runs - (joined if kind == 4 else 0) for kind, runs in enumerate(once[13:])]


@given(st.text(max_size=300))
def test_text_features_count_every_character_once(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    features = text_features(data)
    assert sum(features[:13]) == len(text)
    assert all(runs <= count for count, runs in zip(features[:13], features[13:], strict=True))


def test_features_count_parts_twice_and_what_is_not_text_once() -> None:
    content = a_prompt("hello")
    content.add_tool({"name": "f"})
    content.add_image(Image("http://x", 100.0))
    content.add_audio("abc", 3.0)
    content.add_text("thought", Part.REASONING)
    features = content.features()
    assert features[Feature.MESSAGES] == features[Feature.TOOLS] == features[Feature.IMAGES] == 1
    assert (features[Feature.IMAGE_PATCHES], features[Feature.AUDIO_S]) == (100.0, 3.0)
    assert features[Feature.PART + Part.TOOLS - 1] > 0
    assert features[Feature.PART + Part.REASONING - 1] > 0
    assert features[Feature.PART + Part.CALLS - 1] == 0


def test_blocks_of_a_longer_chat_begin_with_those_of_a_shorter_one() -> None:
    first, second = a_prompt("x" * 1000), a_prompt("x" * 1000, "y" * 1000)
    short, long = blocks_of(first, 1), blocks_of(second, 1)
    assert len(short) == 1000 // BLOCK_BYTES
    assert long[: len(short)] == short
    assert not set(blocks_of(first, 2)) & set(short)


def test_blocks_differ_by_image_and_by_tool() -> None:
    def blocks(url: str, tool: str) -> tuple[int, ...]:
        content = PromptContent()
        content.add_tool({"name": tool, "description": "d" * 300})
        content.add_image(Image(url, 1000.0))
        content.add_text("x" * 600)
        return blocks_of(content)

    one, other_image, other_tool = blocks("a", "f"), blocks("b", "f"), blocks("a", "g")
    assert one == blocks("a", "f")
    assert len(one) > 1000 * 4 // BLOCK_BYTES
    assert one[0] == other_image[0]
    assert not set(one[2:]) & set(other_image[2:])
    assert not set(one) & set(other_tool)


def test_blocks_of_token_ids_need_no_text() -> None:
    content = PromptContent()
    content.token_ids = list(range(200))
    data, block_bytes = content.rendered()
    assert (len(data), block_bytes, len(blocks_of(content))) == (800, 256, 3)


def test_schema_of_the_response_does_not_change_the_blocks() -> None:
    plain, constrained = a_prompt("x" * 600), a_prompt("x" * 600)
    constrained.add_json({"type": "json_schema", "schema": "y" * 900}, Part.SCHEMA)
    assert blocks_of(plain) == blocks_of(constrained)


def test_history_of_tool_calls_changes_the_blocks() -> None:
    def blocks(arguments: str) -> tuple[int, ...]:
        content = PromptContent()
        read_message(
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}, content
        )
        return blocks_of(content)

    assert blocks("a" * 600) == blocks("a" * 600) != blocks("b" * 600)


def test_images_of_a_prompt_take_little_memory_whatever_size_they_claim() -> None:
    """A body of 8 MB has room for 80,000 images that each claim 16,384 patches: it took 7 GB."""
    content = PromptContent()
    for number in range(5000):
        content.add_image(Image(str(number), 16_384.0))
        content.add_audio(str(number), 1e6)
    data, _ = content.rendered()
    assert len(data) < 6 << 20
    assert content.features()[Feature.IMAGE_PATCHES] == 5000 * 16_384


def test_images_beyond_the_limit_are_still_told_apart() -> None:
    def of(last: str) -> bytes:
        content = PromptContent()
        content.add_audio("long", 1e9)
        content.add_image(Image(last, 100.0))
        return content.rendered()[0]

    assert of("a") != of("b")


def test_text_completion_counts_no_template() -> None:
    content = PromptContent()
    content.add_text("one two three")
    assert content.features()[Feature.REQUEST] == 0
    assert a_prompt("one two three").features()[Feature.REQUEST] == 1
