"""benchmarks/sglang_server.py without a server: the profile's reading, the comparison, the table, a failed start."""

import argparse
import gzip
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/results/nvidia_h100_80gb_hbm3/sglang_server.jsonl"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("sglang_server", ROOT / "benchmarks/sglang_server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_that_overlap_count_once_and_neighbours_between_two_of_the_experts_count(bench, tmp_path):
    def kernel(name, start, dur, stream=7):
        return {"cat": "kernel", "name": name, "ts": start, "dur": dur, "args": {"stream": stream}}

    events = [
        kernel("attention", 0, 10),
        kernel("route_kernel", 10, 10),
        kernel("per_token_group_quant", 20, 10),  # between two of the experts
        kernel("gemm2_kernel", 30, 20),
        kernel("combine_kernel", 40, 20),  # launched early: waits for the one before
        kernel("_fwd_grouped_kernel_stage1", 70, 10),  # attention, for all that its name says
        kernel("shared_expert", 15, 30, stream=9),
        {"ph": "M", "name": "process_name"},
    ]
    trace = tmp_path / "x.trace.json.gz"
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": events}, file)
    profile = bench.kernels_of(trace, 2)
    assert (profile["span_us"], profile["busy_us"], profile["experts_us"]) == (40, 35, 25)
    assert profile["kernels"][0] == ["shared_expert", 0.5, 15]


def test_texts_are_compared_to_their_first_difference(bench):
    reference = {"logprobs": [[-1.0, -2.0]], "tokens": [[5, 6, 7]]}
    other = {"logprobs": [[-1.5, -2.0]], "tokens": [[5, 9, 7]]}
    assert bench.judge(other, reference) == (0.25, pytest.approx(1), [1])
    assert bench.judge(reference, reference) == (0.0, pytest.approx(1), [3])


def test_the_table_is_of_the_records(bench):
    table = bench.table([json.loads(line) for line in RECORDS.read_text().splitlines()])
    assert "deepseek-v3, 12 layers, tp 1, ep 1, NVIDIA H100 80GB HBM3" in table
    row = next(line for line in table.splitlines() if line.startswith("| decode 32, itl_ms"))
    assert row.split(" | ")[1:3] == ["9.973 (9.958 to 9.974)", "10.45 (10.38 to 10.63) |"]
    two = table[table.index("tp 2, ep 2") :]
    assert "| log probabilities beside triton | 0.0559, r = 0.9963 |" in two
    assert "| log probabilities beside its own of other ranks | 0.0497, r = 0.9969 |" in two


def test_a_server_that_stops_is_a_record_that_says_so(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "machine", lambda devices: {"devices": ["a GPU"], "versions": {}})
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    args = argparse.Namespace(
        runners=["triton"], batches=[1], prefill=[], prefill_graphs=False, kv_tokens=64, tp=1, ep=1, port=1,
        server_arg=[], logs=tmp_path, limit=5.0, profile=[], repeats=1, new=2,
    )  # fmt: skip
    record = bench.run(tmp_path, "triton", 0, tmp_path, args)
    assert record["failed"].startswith("triton stopped") and record["answers"] == {}
