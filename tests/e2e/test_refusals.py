"""What a user sees of features that do not work: exit code 1, and a message without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.live.dummy_model import write_dummy_model
from tests.fixtures.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_gateway_refuses_pipelines_and_ranks_in_its_process(tmp_path: Path) -> None:
    config = {
        "server": {"port": free_port()},
        "engines": [
            {
                "kind": "vllm",
                "name": "local",
                "model": str(write_dummy_model(tmp_path / "model")),
                "flags": {"pipeline-parallel-size": 2, "data-parallel-size": 2, "load-format": "dummy"},
                "env": {"HF_HUB_OFFLINE": 1, "VLLM_LOGGING_LEVEL": "ERROR"},
            }
        ],
        "predictor": {"enabled": False, "expected_tokens": 8},
        "classes": {"chat": {}},
        "default_class": "chat",
    }
    file = tmp_path / "antares.yaml"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [str(Path(sys.executable).parent / "antares"), "serve", "-c", str(file)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    shown = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1, shown
    assert "pipeline-parallel-size is not supported: with stages several steps" in shown
    assert "data-parallel-size is not supported: the gateway counts one rank's slots" in shown
    assert "Use one engine per rank" in shown
    assert "Traceback" not in shown
