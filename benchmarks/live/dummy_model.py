"""Llamas with random weights: real models to vLLM, of any shape, with nothing to download but a small tokenizer.

    python -m benchmarks.live.dummy_model FOLDER --shape llama-3.1-8b

Their answers mean nothing; their step times are those of the real model. `SMALL` is fast enough on two cores to be
driven into overload, with a GPU's shape: a base cost, a little per sequence, more per prompt token.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from engine_adapter.vllm.smollm2 import prepare

SMALL: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "vocab_size": 4096,
}
"""With the tokenizer's 49,152 tokens half of its weights would be the output layer's, which only decodes pay for; in
an 8B model these are 6%."""

SHAPES: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "medium": {
        **SMALL,
        "torch_dtype": "float32",
        "hidden_size": 768,
        "intermediate_size": 2112,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 49_152,
    },
    "llama-3.1-8b": {
        "torch_dtype": "bfloat16",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128_256,
    },
}
"""What differs between them in a `config.json`."""


def write_dummy_model(folder: Path, shape: str = "small") -> Path:
    """Write configuration and tokenizer into ``folder``; vLLM makes up the weights (`load-format: dummy`).

    The tokenizer is SmolLM2's, cut off at the shape's vocabulary, or with made-up tokens up to it. KeyError: no such
    shape.
    """
    chosen = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    smollm2 = prepare()
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder / name)
    tokens = json.loads((smollm2 / "config.json").read_text())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        **{key: tokens[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **chosen,
    }
    _write_tokenizer(smollm2 / "tokenizer.json", folder / "tokenizer.json", config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _write_tokenizer(source: Path, target: Path, vocabulary: int) -> None:
    """Every id that random weights may produce must have a text, and no text an id that they know nothing of."""
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    # Tokens are numbered in the order in which they were merged: the first of them are a tokenizer too.
    known: dict[str, int] = {token: number for token, number in model["vocab"].items() if number < vocabulary}
    taken = {*known.values(), *(added["id"] for added in tokenizer["added_tokens"])}
    known.update({f"<extra_{number}>": number for number in range(vocabulary) if number not in taken})
    model["vocab"] = known
    model["merges"] = [pair for pair in model["merges"] if _merged(pair) in known]
    target.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _merged(pair: str | list[str]) -> str:
    """What a merge makes; tokenizer files write the two with a space between them, or as a list."""
    return "".join(pair.split(" ") if isinstance(pair, str) else pair)


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "small",
) -> None:
    """Write a model with random weights for vLLM's `--load-format dummy`."""
    if shape not in SHAPES:
        typer.echo(f"no shape is called {shape!r}; choose one of {', '.join(SHAPES)}", err=True)
        raise typer.Exit(2)
    typer.echo(write_dummy_model(folder, shape))


if __name__ == "__main__":
    typer.run(main)
