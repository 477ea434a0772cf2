"""benchmarks.markdown: tables, wrapped text, and blocks between markers."""

from __future__ import annotations

from benchmarks.markdown import anchor, table, with_block, wrapped


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_wrapped_fills_prose_and_lists_and_keeps_tables_and_code() -> None:
    code = "```\n" + "x" * 130 + "\n```"
    cells = table(["head"], [["cell " * 40]])
    text = wrapped("\n\n".join(["one\ntwo", "- first\nitem\n- second " + "word " * 30, code, cells]))
    prose, items, kept_code, kept_cells = text.split("\n\n")
    assert prose == "one two"
    lines = items.splitlines()
    assert lines[0] == "- first item"
    assert [line[:2] for line in lines] == ["- ", "- ", "  "]
    assert max(map(len, lines)) <= 120
    assert (kept_code, kept_cells) == (code, cells)


def test_with_block_keeps_other_text_and_replaces_block() -> None:
    text = with_block("# Results\n\nFirst.\n\n## Measured\n\nReal.\n", "simulated", "one")
    assert text.index("First.") < text.index("one") < text.index("## Measured")
    again = with_block(text, "simulated", "two \\1")
    assert "one" not in again
    assert "two \\1" in again
    assert again.endswith("## Measured\n\nReal.\n")


def test_anchor_is_fragment_of_heading() -> None:
    assert anchor("Each guard alone (SCORPIO, figure 6)") == "each-guard-alone-scorpio-figure-6"
