"""A real vLLM on CPU with n-gram speculation and the step gate answers as stock vLLM does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.vllm import smollm2

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 400

pytestmark = [pytest.mark.engine, pytest.mark.timeout(TIMEOUT_S + 60)]


def run(folder: Path, model: Path) -> dict[str, Any]:
    """Return what `tests.fixtures.ngram_answers` prints, which runs in a process of its own."""
    command = [sys.executable, "-m", "tests.fixtures.ngram_answers", str(model)]
    out, log = folder / "answers.json", folder / "vllm.log"
    with out.open("wb") as stdout, log.open("wb") as stderr:
        # vLLM starts processes of its own, so the whole group must end.
        process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True)
    try:
        code = process.wait(TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert code == 0, log.read_text()[-2000:]
    found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    return found


def test_answers_with_drafts_equal_stock_ones(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = smollm2.prepare(report=lambda line: None)
    found = run(tmp_path, model)
    assert found["ngram"] == found["stock"]
    assert 0 < found["accepted"] <= found["drafts"]
