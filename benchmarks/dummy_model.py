"""A small Llama with random weights: a real model to vLLM, fast enough on two cores to be driven into overload.

Its answers mean nothing; its step times have a GPU's shape (a base cost, a little per sequence, more per prompt token).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from engine_adapter.smollm2 import prepare

LAYERS, WIDTH, HEAD_WIDTH = 8, 512, 64


def write_dummy_model(folder: Path, layers: int = LAYERS, width: int = WIDTH) -> Path:
    """Write configuration and tokenizer into ``folder``; vLLM makes up the weights (`load-format: dummy`).

    ``width`` is a multiple of 64, the width of an attention head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    smollm2 = prepare()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder / name)
    tokens = json.loads((smollm2 / "config.json").read_text())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "num_key_value_heads": width // HEAD_WIDTH,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **{key: tokens[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
