"""Writes docs/results/prompt_size.md from the JSON files of the two studies.

python -m benchmarks.prompt_size.page docs/results/prompt_size.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.markdown import table, wrapped

IN_PROCESS = "prompt_size_in_process.json"
"""Name of the other study's file, beside the first."""

Row = dict[str, Any]


def page(remote: Row, in_process: Row) -> str:
    """Return the page: both studies, their commands, and their tables."""
    sizes = "; ".join(f"{s['tokenizer']} {s['p10']:,} / {s['p50']:,} / {s['p90']:,}" for s in remote["sizes"])
    worst = max(row["worst"] for row in in_process["rows"])
    number = in_process["rows"][-1]["requests"]
    text = f"""# Error of the prompt size

How far the prompt size that requests are scheduled with is from what the model counts. p50 and p90 are quantiles of the
absolute relative error.

## In-process (`kind: vllm`): exact

**CPU, a real vLLM with SmolLM2-135M-Instruct.** vLLM renders each prompt before it is scheduled. Of {number} requests
the largest error is {worst:.1%}. `usage.prompt_tokens` of the response is the truth. Images are left out: this model
reads none.

{table(("kind", "requests", "p50", "p90", "largest"), [_in_process_cells(row) for row in in_process["rows"]])}

```
python -m benchmarks.prompt_size.in_process --seed {in_process["seed"]} --json > docs/results/{IN_PROCESS}
```

Flags: {in_process["flags"]}.

## Remote (`kind: http`): an estimate that learns

**CPU, real tokenizers, no engine.** The gateway's own reader and estimate, against {len(remote["sizes"])} tokenizers
with chat templates. {remote["test"]} requests are evaluated after 0, 10, 50 and {remote["train"]} others were learned
from. Both sets mix all kinds at random, and share no source text. Sizes in tokens (p10 / p50 / p90): {sizes}.

- `nemo`: Mistral NeMo's tokenizer and Mistral's template; images as in Mistral Small 3.1, patches of 28 pixels.
- `mistral-v3`: Mistral 7B v0.3's tokenizer and Mistral's template; images as in LLaVA 1.5, 576 tokens each.
- `smollm2`: SmolLM2's tokenizer and ChatML with Hermes' tool format; images as in Qwen2-VL.

Images are counted by the models' formulas. All other tokens come from the tokenizers.

{table(("tokenizer", "server", "learned from", "p50", "p90", "bias"), _overall(remote["learning"]))}

*vLLM*: the server counts the sample chats of `gateway/prompts/samples.py` when it comes up (`/tokenize`). They share no
text with either half. *other*: no server counts anything before the first request. Bias is the median signed error.

### By kind

p50 / p90 of each kind.

{_by_kind(remote["learning"])}

The large errors of other servers before anything is learned have three causes:

- *response schema*: the estimate counts the schema of `response_format`. Mistral's templates do not render it, as with
  most models on vLLM. The first requests teach that.
- *images*: 576 tokens for an image of any size cannot be guessed from its pixels.
- *CJK, other languages*: vocabularies differ by a factor of three between these models.

### Traffic that changes

One model sees {_phases(remote["changing"])}, {remote["changing"][-1]["to"]} requests each. Every request is estimated
before it is learned from. p50 / p90 of the requests of a phase:

{_changing(remote["changing"])}

```
python -m benchmarks.prompt_size.remote --seed {remote["seed"]} --json > docs/results/prompt_size.json
python -m benchmarks.prompt_size.page docs/results/prompt_size.json
```
"""
    return wrapped(text) + "\n"


def _in_process_cells(row: Row) -> list[str]:
    return [row["kind"], str(row["requests"]), *(f"{row[key]:.1%}" for key in ("p50", "p90", "worst"))]


def _overall(rows: list[Row]) -> list[list[str]]:
    return [
        [
            row["tokenizer"],
            _server(row),
            str(row["learned"]),
            f"{row['p50']:.1%}",
            f"{row['p90']:.1%}",
            f"{row['bias']:+.1%}",
        ]
        for row in rows
        if row["kind"] == "all"
    ]


def _server(row: Row) -> str:
    return "vLLM" if row["calibrated"] else "other"


def _by_kind(rows: list[Row]) -> str:
    shown = [row for row in rows if row["learned"] == 0 or (row["learned"] == 50 and row["calibrated"])]
    columns = list(dict.fromkeys((row["tokenizer"], _server(row), row["learned"]) for row in shown))
    heads = ["kind", *(f"{name}, {server}, {f'after {n}' if n else 'cold'}" for name, server, n in columns)]
    by_key = {(row["kind"], row["tokenizer"], _server(row), row["learned"]): row for row in rows}
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return table(heads, [[kind, *(_pair(by_key[kind, *column]) for column in columns)] for kind in kinds])


def _phases(rows: list[Row]) -> str:
    return ", then ".join(dict.fromkeys(row["phase"] for row in rows))


def _changing(rows: list[Row]) -> str:
    parts = list(dict.fromkeys((row["from"], row["to"]) for row in rows))
    by_key = {(row["tokenizer"], row["phase"], row["from"]): row for row in rows}
    names = dict.fromkeys((row["tokenizer"], row["phase"]) for row in rows)
    heads = ["tokenizer", "phase", *(f"requests {first + 1} to {last}" for first, last in parts)]
    return table(heads, [[*name, *(_pair(by_key[(*name, first)]) for first, _ in parts)] for name in names])


def _pair(row: Row) -> str:
    return f"{row['p50']:.0%} / {row['p90']:.0%}"


def main(
    remote: Annotated[Path, typer.Argument(help="JSON file of benchmarks.prompt_size.remote.")],
) -> None:
    """Write the page beside the JSON files."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in (remote, remote.with_name(IN_PROCESS))]
    remote.with_suffix(".md").write_text(page(*documents), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
