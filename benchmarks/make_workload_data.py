"""Writes the length and arrival files in ``lab/workload/data``, which are committed.

    python -m benchmarks.make_workload_data sharegpt                    # needs the extra 'train'
    python -m benchmarks.make_workload_data azure-conv CONV.csv         # github.com/Azure/AzurePublicDataset,
    python -m benchmarks.make_workload_data azure-code CODE.csv.gz      # AzureLLMInferenceTrace_*.csv, gzipped or not

The files hold counts and times only, no text. ``lab/workload/data/README.md`` describes them.
"""

from __future__ import annotations

import csv
import gzip
import io
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lab.workload.lengths import DATA


def sharegpt() -> None:
    """Write token counts of every opening turn and its answer, in file order."""
    from predictor_service.training.sharegpt import read_turns

    turns = [turn for turn in read_turns() if turn.first]
    encoding = import_module("bpe_openai").get_encoding("cl100k_base")
    pairs = [(len(encoding.encode_ordinary(turn.prompt)), turn.length) for turn in turns]
    prompts, outputs = np.array(pairs, dtype=np.uint32).T
    np.savez_compressed(DATA / "sharegpt.npz", prompt_tokens=prompts, output_tokens=outputs)


def azure(name: str, file: Path) -> None:
    """Write arrival times and token counts of one trace, in order of arrival."""
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    # The trace has a resolution of 100 ns, `datetime` of 1 us.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    since_first_us = np.array([round((at - times[0]).total_seconds() * 1e6) for at in times])
    if (np.diff(since_first_us) < 0).any():
        raise SystemExit(f"{file}: arrivals are not in order")
    np.savez_compressed(
        DATA / f"{name}.npz",
        # Gaps compress better than times.
        gap_us=np.diff(since_first_us, prepend=0).astype(np.uint32),
        prompt_tokens=np.array([int(row["ContextTokens"]) for row in rows], dtype=np.uint16),
        output_tokens=np.array([int(row["GeneratedTokens"]) for row in rows], dtype=np.uint16),
    )


def main(
    name: Annotated[str, typer.Argument(help="sharegpt, azure-conv or azure-code.")],
    file: Annotated[Path | None, typer.Argument(help="The trace, for azure-*.")] = None,
) -> None:
    """Write one data file."""
    if name == "sharegpt":
        sharegpt()
    elif name in ("azure-conv", "azure-code") and file is not None:
        azure(name, file)
    else:
        raise typer.BadParameter("sharegpt, or azure-conv FILE, or azure-code FILE")


if __name__ == "__main__":
    typer.run(main)
