"""The access log and `antares explain` of a gateway that runs as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from tests.fixtures.live_gateway import CHAT, chat
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.served_process import served

pytestmark = pytest.mark.process

CONFIG = """\
server: {port: 0, drain_s: 5}
engines: [{kind: simulated}]
predictor: {enabled: false}
default_class: chat
classes: {chat: {ttft_ms: 5000}}
logging: {access: json, access_path: "LOG"}
"""
_MAIN = "import sys; sys.argv[0] = 'antares'; from gateway.cli import main; main()"


async def run(*arguments: str) -> tuple[int, str]:
    """Run the `antares` command and return its exit code and its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _MAIN, *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_log_survives_rotation_and_the_signal_of_rotating_tools(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    async with served(tmp_path, CONFIG.replace("LOG", str(log))) as (process, http):
        await http.post(CHAT, json=chat(max_tokens=2), headers={"x-request-id": "before"})
        await eventually(log.read_text)
        log.rename(tmp_path / "access.jsonl.1")
        process.send_signal(signal.SIGUSR1)
        await http.post(CHAT, json=chat(max_tokens=2), headers={"x-request-id": "after", "x-slo-ttft-ms": "0.01"})

        code, explained = await run("explain", "after", "--url", str(http.base_url))

        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), HANG_S) == 0

    assert (code, explained.splitlines()[0][:26]) == (0, "Request after was rejected")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # The second line is the question of `antares explain`.
    assert [(line["route"], line["status"]) for line in lines] == [(CHAT, 429), ("/v1/requests/{id}", 200)]


async def test_unwritable_log_ends_the_start_with_the_key_to_fix(tmp_path: Path) -> None:
    (tmp_path / "antares.yaml").write_text(CONFIG.replace("LOG", str(tmp_path / "absent" / "access.jsonl")))
    code, output = await run("serve", "-c", str(tmp_path / "antares.yaml"))
    assert code == 1
    assert "logging.access_path: cannot open" in output
    assert "Traceback" not in output
