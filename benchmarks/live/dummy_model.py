"""Writes Llama models with random weights for vLLM, in several shapes; only a small tokenizer is downloaded.

    python -m benchmarks.live.dummy_model FOLDER --shape llama-3.1-8b

The answers are meaningless, but the step times are those of the real model. Two cores can drive `SMALL` into overload,
and its step times have the form of a GPU's: a base cost, a little per sequence, more per prompt token.
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
"""A small model whose vocabulary is cut to 4,096 tokens.

With the tokenizer's 49,152 tokens the output layer, which only decodes use, would hold half of the weights. In an 8B
model it holds 6%."""

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
    "experts": {
        **SMALL,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
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
"""Members of `config.json` that differ between the shapes."""


def write_dummy_model(folder: Path, shape: str = "small") -> Path:
    """Write configuration and tokenizer into ``folder`` and return it; vLLM draws the weights (`load-format: dummy`).

    The tokenizer is SmolLM2's, cut at the shape's vocabulary size or filled up to it with placeholder tokens.

    Raises:
        KeyError: ``shape`` is not in `SHAPES`.
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
    """Write ``source`` with ``vocabulary`` tokens to ``target``.

    INVARIANT: every id that the weights can produce has a text, and no text has an id above them.
    """
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    # Ids follow the order of merges, so the tokens below any id form a valid tokenizer.
    kept: dict[str, int] = {token: number for token, number in model["vocab"].items() if number < vocabulary}
    taken = {*kept.values(), *(added["id"] for added in tokenizer["added_tokens"])}
    kept.update({f"<extra_{number}>": number for number in range(vocabulary) if number not in taken})
    model["vocab"] = kept
    model["merges"] = [pair for pair in model["merges"] if _merged(pair) in kept]
    target.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _merged(pair: str | list[str]) -> str:
    """The token that a merge produces. Tokenizer files write the pair with a space, or as a list."""
    return "".join(pair.split(" ") if isinstance(pair, str) else pair)


def main(
    folder: Annotated[Path, typer.Argument(help="Output folder.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "small",
) -> None:
    """Write a model with random weights for vLLM's `--load-format dummy`."""
    if shape not in SHAPES:
        typer.echo(f"unknown shape {shape!r}: choose from {', '.join(SHAPES)}", err=True)
        raise typer.Exit(2)
    typer.echo(write_dummy_model(folder, shape))


if __name__ == "__main__":
    typer.run(main)
