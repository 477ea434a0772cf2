"""benchmarks.overhead.before_after: runs two source trees side by side and reports the differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.overhead.before_after import (
    KINDS,
    SHAPES,
    TREES,
    Shape,
    differences,
    main,
    measure,
    page,
    token_differences,
)


def runs(per_token_us: float = 50.0) -> list[dict[str, Any]]:
    """Return two rounds in which *after* costs 10 us more per request, 14 in the second round."""
    return [
        {
            "round": at, "shape": shape.name, "kind": kind, "tree": tree,
            "cpu_us": 300.0 + per_token_us * shape.tokens + (10.0 + 4 * at) * (tree == "after"),
        }
        for at in (0, 1) for shape in SHAPES for kind in KINDS for tree in TREES
    ]  # fmt: skip


def test_differences_are_medians_and_quartiles_of_rounds() -> None:
    rows = {(row["kind"], row["shape"]): row for row in differences(runs())}
    assert len(rows) == len(KINDS) * len(SHAPES)
    row = rows["around", SHAPES[0].name]
    assert (row["before"], row["after"]) == (350.0, 362.0)
    assert (row["added"], row["low"], row["high"]) == (12.0, 11.0, 13.0)


def test_token_differences_leave_out_the_cost_of_the_request() -> None:
    assert [(row["kind"], row["before"], row["added"]) for row in token_differences(runs())] == [
        (kind, 50.0, pytest.approx(0.0)) for kind in KINDS
    ]


def test_page_has_rows_and_command() -> None:
    text = page({"before": "aaa1111", "after": "bbb2222", "rounds": 2, "runs": runs()})
    assert f"| around | {SHAPES[0].name} | 350 | 362 | +12.0 (+11.0 to +13.0) |" in text
    assert "| in front | per streamed token | 50.0 | 50.0 | +0.0 (+0.0 to +0.0) |" in text
    assert "git worktree add TREE aaa1111" in text


async def test_measure_serves_both_trees_and_kinds() -> None:
    here = Path(__file__).parents[2]
    tiny = (Shape("one token", 3, 24, 1, stream=False), Shape("stream", 1, 24, 5, stream=True))
    found = await measure({"before": here, "after": here}, rounds=1, shapes=tiny)
    assert {(run["tree"], run["kind"], run["shape"]) for run in found} == {
        (tree, kind, shape.name) for tree in TREES for kind in KINDS for shape in tiny
    }
    assert all(run["cpu_us"] > 0 for run in found)


def test_command_requires_the_other_tree() -> None:
    with pytest.raises(typer.BadParameter, match="other checkout"):
        main()
