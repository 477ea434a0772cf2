"""The same seed, the same JSON: the command run twice, its output hashed."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures.figure import Document, Figure, document
from benchmarks.figures.lab import Lab
from benchmarks.figures.records import table

NAME = "determinism"
PROFILE = "a100-llama3.1-8b"
SEED = 7
POLICIES = ("fcfs", "s3", "mooncake", "scorpio")
JOBS = (1, 2)


def measure(lab: Lab, quick: bool) -> Document:
    """Twice, once in one process and once shared by two."""
    arguments = ["simulate", "--qps", "20", "--qps", "60", "--requests", "10" if quick else "900", "--seed", str(SEED)]
    for policy in POLICIES[:1] if quick else POLICIES:
        arguments += ["--policy", policy]
    arguments += ["--profile", PROFILE, "--json", "--no-timings"]
    hashes = lab.each("Determinism", _hashed, [[*arguments, "--jobs", str(jobs)] for jobs in JOBS])
    runs = {
        "ran": "antares " + " ".join(arguments),
        "jobs": list(JOBS),
        "sha256": hashes,
        "same": len(set(hashes)) == 1,
    }
    made_with = {"python": platform.python_version(), "numpy": np.__version__}
    return document(NAME, (SEED,), (PROFILE,), **runs, made_with=made_with)


def _hashed(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "lab.cli", *arguments], check=True, capture_output=True)
    return hashlib.sha256(done.stdout).hexdigest()


def draw(made: Document, folder: Path) -> list[str]:
    """Nothing to draw."""
    return []


def section(made: Document) -> str:
    """The command and the hashes."""
    pairs: list[tuple[Any, Any]] = list(zip(made["jobs"], made["sha256"], strict=True))
    made_with = made["made_with"]
    return f"""**Asked:** the same seed gives the same JSON, twice.

```
{made["ran"]} --jobs 1 | sha256sum
```

{table(["processes", "SHA-256 of the output"], [[str(jobs), f"`{digest}`"] for jobs, digest in pairs])}

{"The same, byte for byte" if made["same"] else "**Not the same**"}, with one process and with two. `--no-timings`
leaves out what a clock says, which is all
that may differ. Another NumPy may draw other numbers: these are from Python {made_with["python"]}, NumPy
{made_with["numpy"]}. The JSON files of this
folder, but for `cost.json`, hold no wall-clock times either, so the same code writes the same files again.
"""


def headline(made: Document) -> str:
    """Whether it holds."""
    return f"the same JSON from the same seed, twice: {'yes' if made['same'] else '**no**'}"


FIGURE = Figure(NAME, "The same seed, the same result", measure, draw, section, headline)
