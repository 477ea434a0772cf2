"""Checks that the same seed gives the same JSON: runs one command twice and compares the hashes of its output."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures.figure import Document, Figure, new_document
from benchmarks.figures.lab import Lab
from benchmarks.markdown import table

NAME = "determinism"
PROFILE = "a100-llama3.1-8b"
SEED = 7
POLICIES = ("fcfs", "s3", "mooncake", "scorpio")
JOBS = (1, 2)


def measure(lab: Lab, quick: bool) -> Document:
    """Run the command with one process, then with two."""
    arguments = ["simulate", "--qps", "20", "--qps", "60", "--requests", "10" if quick else "900", "--seed", str(SEED)]
    for policy in POLICIES[:1] if quick else POLICIES:
        arguments += ["--policy", policy]
    arguments += ["--profile", PROFILE, "--json", "--no-timings"]
    hashes = lab.each("Determinism", _output_hash, [[*arguments, "--jobs", str(jobs)] for jobs in JOBS])
    runs = {
        "hashed_command": "antares " + " ".join(arguments),
        "jobs": list(JOBS),
        "sha256": hashes,
        "same": len(set(hashes)) == 1,
    }
    made_with = {"python": platform.python_version(), "numpy": np.__version__}
    return new_document(NAME, (SEED,), (PROFILE,), **runs, made_with=made_with)


def _output_hash(arguments: list[str]) -> str:
    process = subprocess.run([sys.executable, "-m", "lab.cli", *arguments], check=True, capture_output=True)
    return hashlib.sha256(process.stdout).hexdigest()


def draw(document: Document, folder: Path) -> list[str]:
    """Draw nothing."""
    return []


def section(document: Document) -> str:
    """The command, the hashes, and whether they are equal."""
    pairs: list[tuple[Any, Any]] = list(zip(document["jobs"], document["sha256"], strict=True))
    versions = document["made_with"]
    return f"""**Requirement:** the same seed gives the same JSON.

```
{document["hashed_command"]} --jobs 1 | sha256sum
```

{table(["processes", "SHA-256 of the output"], [[str(jobs), f"`{digest}`"] for jobs, digest in pairs])}

The outputs of one process and of two are {"identical" if document["same"] else "**not identical**"}. `--no-timings`
leaves out wall-clock times, which vary. Another NumPy version may draw other random numbers; these hashes are from
Python {versions["python"]} and NumPy {versions["numpy"]}. Except for `cost.json`, the figures' JSON files hold no
wall-clock times, so the same code writes the same files.
"""


def headline(document: Document) -> str:
    """Whether the outputs are identical."""
    return f"the same seed gives the same JSON: {'yes' if document['same'] else '**no**'}"


FIGURE = Figure(NAME, "Determinism", measure, draw, section, headline)
