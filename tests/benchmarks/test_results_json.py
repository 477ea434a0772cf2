"""benchmarks.results_json: one record per line, and all result files in that layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results_json

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
FILES = sorted(RESULTS.glob("*.json"))


def test_dumps_writes_one_record_per_line() -> None:
    document = {"seeds": [0, 1], "made_with": {"a": 1.5}, "parts": [{"name": "é", "runs": [{"x": 1}, {"x": None}]}]}
    text = """{
  "seeds": [0, 1],
  "made_with": {"a": 1.5},
  "parts": [
    {
      "name": "é",
      "runs": [
        {"x": 1},
        {"x": null}
      ]
    }
  ]
}
"""
    assert results_json.dumps(document) == text
    assert json.loads(text) == document


def test_dumps_rejects_nan() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        results_json.dumps({"x": float("nan")})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_result_files_have_this_layout(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert results_json.dumps(json.loads(text)) == text
