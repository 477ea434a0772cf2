"""Traces of other projects, as files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lab.workload import make_workload
from lab.workload.trace_file import TraceError, is_trace_file, read_trace

MOONCAKE = [
    {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2353]},
    {"timestamp": 30535, "input_length": 1500, "output_length": 26, "hash_ids": [46, 47, 2366]},
]


def _lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mooncake_lines_have_milliseconds_and_shared_prefixes(tmp_path: Path) -> None:
    trace = _lines(tmp_path / "conversation.jsonl", MOONCAKE)

    first, second = make_workload(str(trace), arrivals="trace")

    assert (first.at_s, second.at_s) == (0.0, pytest.approx(3.053))
    assert (first.prompt_tokens, first.output_tokens) == (1100, 52)
    # Two shared blocks of 512 tokens are 64 of 16.
    assert first.blocks[:64] == second.blocks[:64]
    assert not set(first.blocks[64:]) & set(second.blocks[64:])
    assert len(first.blocks) == 72
    assert len(set(first.blocks)) == len(first.blocks)


def test_bailian_lines_have_seconds_and_blocks_of_16_tokens(tmp_path: Path) -> None:
    rows = [
        {"chat_id": 1, "timestamp": 61.1, "input_length": 40, "output_length": 7, "hash_ids": [1, 2, 3]},
        {"chat_id": 2, "timestamp": 62.6, "input_length": 33, "output_length": 7, "hash_ids": [1, 9, 10]},
    ]

    first, second = read_trace(_lines(tmp_path / "qwen.jsonl", rows))

    assert second.at_s == pytest.approx(1.5)
    assert first.block_tokens == 16
    assert first.prefix[0] == second.prefix[0] != second.prefix[1]


def test_timed_trace_of_vllm_takes_its_unit_and_block_size(tmp_path: Path) -> None:
    rows = [{"timestamp": at, "input_length": 9, "output_length": 1} for at in (5, 7.5)]

    requests = read_trace(_lines(tmp_path / "trace.jsonl", rows), unit="s", block_tokens=32)

    assert [row.at_s for row in requests] == [0.0, 2.5]


@pytest.mark.parametrize(
    "text",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,9,10\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:46.680590+00:00,374,44\n"
        "2024-05-10 00:00:50.995169+00:00,9,10\n",
        "Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,1,ChatGPT,374,44,418,Conversation log\n6,1,GPT-4,12,0,12,API log\n9.314579,2,GPT-4,9,10,19,API log\n",
    ],
    ids=["azure 2023", "azure 2024", "burstgpt"],
)
def test_csv_traces_are_recognised_by_their_columns(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))

    first, last = read_trace(path)

    assert (first.prompt_tokens, first.output_tokens) == (374, 44)
    assert last.at_s == pytest.approx(4.314579, abs=1e-6)


def test_sharegpt_has_lengths_but_no_times(tmp_path: Path) -> None:
    path = tmp_path / "ShareGPT.json"
    turns = [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 400}]
    path.write_text(json.dumps([{"id": "a", "conversations": turns}, {"id": "b", "conversations": turns[:1]}]))

    workload = make_workload(str(path), qps=5, requests=3)

    assert [(r.prompt_tokens, r.output_tokens) for r in workload] == [(10, 100)] * 3
    with pytest.raises(ValueError, match="no arrival times: use --workload"):
        make_workload(str(path), arrivals="trace")


def test_recording_of_the_gateway_keeps_its_bounds_and_classes(tmp_path: Path) -> None:
    line = {
        "timestamp": 0,
        "input_length": 100,
        "output_length": 10,
        "block_tokens": 64,
        "hash_ids": [2**63, 2**64 - 1],
    }
    rows = [line | {"slo_class": "chat", "slo_ttft_ms": 500, "slo_tpot_ms": 30}, line | {"slo_class": "batch"}]

    chat, batch = make_workload(str(_lines(tmp_path / "own.jsonl", rows)), arrivals="trace", slo_scale=2)

    assert (chat.ttft_slo_s, chat.tpot_slo_s, chat.e2e_slo_s) == (1.0, 0.06, float("inf"))
    assert batch.ttft_slo_s == batch.tpot_slo_s == float("inf")
    assert (batch.category, chat.category) == (1, 2)
    assert chat.blocks[:6] == batch.blocks[:6]


def test_estimated_blocks_of_one_beginning_have_one_size(tmp_path: Path) -> None:
    line = {"timestamp": 0, "output_length": 1, "slo_class": "chat"}
    rows = [
        line | {"input_length": 1000, "block_tokens": 60.5, "hash_ids": list(range(16))},
        line | {"input_length": 1300, "block_tokens": 65.25, "hash_ids": [*range(16), 20, 21, 22]},
    ]

    first, second = make_workload(str(_lines(tmp_path / "own.jsonl", rows)), arrivals="trace")

    # 16 blocks of 60.5 tokens are 968, which have 60 whole blocks of 16.
    assert first.blocks[:60] == second.blocks[:60]
    assert first.blocks[60] != second.blocks[60]
    # The others follow them, 65.25 tokens each.
    assert sum(block < 1 << 62 for block in second.blocks) == int((16 * 60.5 + 3 * 65.25) // 16)


def test_sequences_of_a_recording_are_requests_with_one_prompt(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 64, "output_length": 9, "block_tokens": 64, "hash_ids": [7], "sequences": 3}

    requests = make_workload(str(_lines(tmp_path / "own.jsonl", [row])), arrivals="trace")

    assert len(requests) == 3
    assert len({tuple(request.blocks[:4]) for request in requests}) == 1


def test_recording_of_several_models_needs_a_choice(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 9, "output_length": 1, "block_tokens": 64}
    path = _lines(tmp_path / "own.jsonl", [row | {"model": name} for name in ("large", "small", "lora")])

    with pytest.raises(TraceError, match=r"own.jsonl:2: .* models large and small.*--trace-model"):
        read_trace(path)
    with pytest.raises(TraceError, match="no request of --trace-model tiny; it has large, small, lora"):
        read_trace(path, models=["tiny"])
    assert len(read_trace(path, models=["small", "lora"])) == 2
    with pytest.raises(ValueError, match="trace_models describe a file"):
        make_workload("sharegpt", qps=1, requests=1, trace_models=["small"])


def test_window_of_a_recording_has_requests_that_ended_late(tmp_path: Path) -> None:
    line = {"input_length": 9, "output_length": 1, "block_tokens": 64, "slo_class": "chat"}
    path = _lines(tmp_path / "own.jsonl", [line | {"timestamp": at} for at in (1000, 9000, 2000)])

    assert [row.at_s for row in read_trace(path, window_s=5)] == [0.0, 1.0]


def test_last_line_may_be_under_way(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 99, "output_length": 1, "block_tokens": 64, "hash_ids": [7]}
    path = _lines(tmp_path / "own.jsonl", [row, row])
    path.write_text(path.read_text()[:-9])

    assert len(read_trace(path)) == 1


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ('{"timestamp": 0, "input_length": 10}', "output_length is missing"),
        ('{"timestamp": -1, "input_length": 10, "output_length": 1}', "timestamp is '-1'"),
        ('{"timestamp": NaN, "input_length": 10, "output_length": 1}', "timestamp is 'nan'"),
        ('{"timestamp": true, "input_length": 10, "output_length": 1}', "timestamp is 'True'"),
        ('{"timestamp": 0, "input_length": "10", "output_length": 1}', "input_length is '10'"),
        ('{"timestamp": 0, "input_length": 1.5, "output_length": 1}', "whole number of tokens"),
        ('{"timestamp": 0, "input_length": 1e9, "output_length": 1}', "at most 10,000,000"),
        ('{"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": 7}', "list of numbers"),
        ("[1, 2]", "must be a JSON object"),
        ("{", "not JSON"),
        ("[" * 5000, "not JSON"),
    ],
)
def test_bad_line_is_named_with_its_fix(tmp_path: Path, line: str, fix: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(MOONCAKE[0]) + "\n\n" + line + "\n")

    with pytest.raises(TraceError, match=r"bad\.jsonl:3: ") as failure:
        read_trace(path)

    assert fix in str(failure.value)


@pytest.mark.parametrize(
    ("name", "text", "fix"),
    [
        ("missing.jsonl", None, "No such file"),
        ("empty.jsonl", "", "no requests"),
        ("trace.txt", "x", "must end in"),
        ("other.csv", "a,b\n1,2\n", "unknown columns"),
        ("azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "azure.csv:2"),
        ("object.json", "{}", "array of ShareGPT"),
        ("cut.json", '[{"conversations": [', "conversation 1 is not complete"),
        ("not.jsonl.gz", "plain text", "cannot read"),
    ],
)
def test_bad_file_says_what_to_do(tmp_path: Path, name: str, text: str | None, fix: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)

    with pytest.raises(TraceError, match=fix):
        read_trace(path)


def test_window_stops_reading(tmp_path: Path) -> None:
    rows = [MOONCAKE[0] | {"timestamp": at} for at in (0, 500, 1000)]
    path = _lines(tmp_path / "trace.jsonl", rows)
    path.write_text(path.read_text() + "not JSON, but never read")

    assert len(read_trace(path, window_s=1.0)) == 2


def test_too_many_requests_ask_for_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.workload.trace_file.MAX_REQUESTS", 1)

    with pytest.raises(TraceError, match="--window"):
        read_trace(_lines(tmp_path / "trace.jsonl", MOONCAKE))


def test_file_names_are_told_from_workloads() -> None:
    assert is_trace_file("traffic.jsonl")
    assert is_trace_file("./traffic")
    assert is_trace_file("azure.csv.gz")
    assert not is_trace_file("azure-conv")


def test_rate_scale_keeps_the_time_scale(tmp_path: Path) -> None:
    rows = [MOONCAKE[0] | {"timestamp": 1000 * at} for at in range(100)]
    path = str(_lines(tmp_path / "trace.jsonl", rows))

    thrice = make_workload(path, arrivals="trace", rate_scale=3)
    part = make_workload(path, arrivals="trace", rate_scale=0.5)

    assert len(thrice) == 300
    assert thrice == sorted(thrice, key=lambda request: request.at_s)
    assert 98 <= thrice[-1].at_s <= 100
    assert 30 < len(part) < 70
    # Copies are other users: they share no prefix.
    assert len({request.blocks[0] for request in thrice}) == 3


def test_rate_scale_needs_a_trace() -> None:
    with pytest.raises(ValueError, match="trace arrivals"):
        make_workload("sharegpt", qps=1, requests=1, rate_scale=2)
    assert len(make_workload("azure-conv", arrivals="trace", rate_scale=2, window_s=60)) == 2 * len(
        make_workload("azure-conv", arrivals="trace", window_s=60)
    )
