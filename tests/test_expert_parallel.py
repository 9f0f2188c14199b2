"""The layer over several ranks: on the CPU with gloo, each split's sum is that of the parts on one device."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hybrid_moe import MoEProblem
from hybrid_moe.measure.readers import read_records
from hybrid_moe.measure.records import BenchRecord, Latency
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import check
from hybrid_moe.reference import has_local_work, moe_reference

ROOT = Path(__file__).parents[1]
EXAMPLE, BENCHMARK = ROOT / "examples" / "expert_parallel.py", ROOT / "benchmarks" / "ranks.py"
CPU = torch.device("cpu")
SPLITS = ("expert_parallel", "tensor_parallel")


def launch(*options, ranks=2):
    """Start torchrun, which waits for its ranks and fails with them."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(EXAMPLE)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*run, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process, timeout=180):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, out + err
    return out


def load(path, monkeypatch):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch):
    """The example's module, in a group of this process alone."""
    module = load(EXAMPLE, monkeypatch)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield module
    dist.destroy_process_group()


@pytest.fixture
def benchmark(monkeypatch):
    return load(BENCHMARK, monkeypatch)


# ---- The example ----


@pytest.mark.parametrize("ranks, experts, tokens", [(2, 8, (1, 3)), (4, 16, (3,))])
def test_processes(tmp_path, ranks, experts, tokens):
    records = tmp_path / "records.jsonl"
    options = ("--device", "cpu", "--steps", "1", "--records", str(records))
    out = finished(launch(*options, "--tokens", *map(str, tokens), ranks=ranks))
    assert f"{ranks} x cpu, {experts} of 16 experts, 256 x 512, routing uniform" in out
    found = read_records(records)
    assert [(r.num_tokens, r.backend) for r in found] == [(count, split) for count in tokens for split in SPLITS]
    for record in found:
        extra = record.model_extra
        assert record.config == {"ranks": ranks} and record.timing == "eager"
        assert record.correctness.relative_l2 < 0.005
        assert extra["fastest_layer_us"] <= extra["layer_us"]
        assert extra["tokens_per_s"] == round(ranks * record.num_tokens / record.latency_us.median * 1e6)
        assert len(extra["rows_of_ranks"]) == ranks
    by_split = {record.backend: record.model_extra["rows_of_ranks"] for record in found[-2:]}
    # By TP each rank has the rows of all.
    assert by_split[SPLITS[1]] == [sum(by_split[SPLITS[0]])] * ranks


def options_of(script, *arguments):
    return script.options_of(["--device", "cpu", "--tokens", "19", "--steps", "1", *arguments])[1]


def test_a_sum_that_lacks_a_part_is_wrong(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "time_rows", lambda *_: script.Times([2.0], [1.0]))
    assert script.run(options_of(script), CPU)
    assert "right: relative L2" in capsys.readouterr().out
    # The first of two ranks, and nobody there to add the other's part.
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(script, "all_gather", lambda everyone, own: everyone.copy_(own.repeat(2, 1)))
    monkeypatch.setattr(script, "reduce_scatter", lambda own, everyone: own.copy_(everyone[: len(own)]))
    monkeypatch.setattr(script, "worst_of_all", lambda own: own)
    for split in ("ep", "tp"):
        assert not script.run(options_of(script, "--split", split), CPU)
        assert f"T = 19, {split}, eager: WRONG: matched ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, ranks, words",
    [
        (["--tokens", "0"], 1, "--tokens: expected 1 or more, got 0"),
        (["--experts", "6"], 4, "--experts: expected a multiple of 4 ranks up to 16, got 6"),
        ([], 32, "--experts: expected a multiple of 32 ranks up to 16, got 16"),
    ],
)
def test_bad_options(script, monkeypatch, arguments, ranks, words):
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    with pytest.raises(ValueError) as caught:
        script.run(options_of(script, *arguments), CPU)
    assert str(caught.value) == words


def test_without_torchrun(script, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["expert_parallel.py"])
    with pytest.raises(SystemExit):
        script.main()
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    out = finished(launch("--tokens", "64", "451", "--steps", "3"), timeout=600)
    assert re.search(r"2 x nvidia_\w+, 64 of 256 experts", out)
    assert len(re.findall(r"right: relative L2", out)) == 8  # T, split, and graph or eager


# ---- The benchmark ----

WHOLE = MoEProblem(
    num_experts=16, num_local_experts=16, top_k=4, n_group=4, topk_group=2, hidden_size=128, intermediate_size=1024
)


@pytest.fixture(scope="module")
def everything():
    return make_inputs(Workload(24), WHOLE, random_weights(WHOLE, CPU))


@pytest.mark.parametrize("dispatched", [False, True])
def test_the_layers_of_all_ranks_add_up(benchmark, monkeypatch, everything, dispatched):
    monkeypatch.setattr(benchmark, "WHOLE", WHOLE)
    total = torch.zeros((24, 128))
    for own, problem in benchmark.parts(everything, benchmark.EP, 8, dispatched):
        work = has_local_work(everything._replace(local_expert_offset=own.local_expert_offset), problem)
        assert own.num_tokens == (int(work.sum()) if dispatched else 24)
        total[work if dispatched else slice(None)] += moe_reference(own, problem)
    expected = moe_reference(everything, WHOLE)
    assert check(total, expected, has_local_work(everything, WHOLE)).passed
    assert float((total - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("ranks", [8, 16])
def test_layers_one_after_the_other(benchmark, monkeypatch, everything, ranks):
    times = iter(range(100, 200))

    def timed(calls, runs):
        calls[0]()
        return Latency(median=next(times))

    monkeypatch.setattr(benchmark, "WHOLE", WHOLE)
    monkeypatch.setattr(benchmark, "time_graph", timed)
    record = benchmark.layers(everything, Workload(24 // ranks), benchmark.EP, ranks, True, {})
    rows = record.model_extra["rows_of_ranks"]
    assert record.status == "passed" and len(rows) == 8
    ran = sum(map(bool, rows))
    assert record.latency_us.median == 99 + ran
    assert record.model_extra["fastest_layer_us"] == (100 if ran == 8 else 0)  # a rank without tokens has nothing to do


def test_a_wrong_layer_has_no_time(benchmark, monkeypatch, everything):
    monkeypatch.setattr(benchmark, "WHOLE", WHOLE)
    monkeypatch.setattr(benchmark, "moe_reference", lambda inputs, problem: 2 * moe_reference(inputs, problem))
    record = benchmark.layers(everything, Workload(3), benchmark.TP, 8, False, {})
    assert record.status == "failed" and "matched ratio" in record.reason


def records_of(ep, tp, tokens=(1, 16, 256)):
    """By T: microseconds of a step by experts and across each expert."""
    for split, times in zip(SPLITS, (ep, tp), strict=True):
        for count, time in zip(tokens, times, strict=True):
            yield BenchRecord(
                device="nvidia_h100_80gb_hbm3",
                problem=replace(WHOLE, num_local_experts=8).definition,
                num_experts=16,
                backend=split,
                config={"ranks": 2},
                num_tokens=count,
                local_expert_offset=0,
                routing="uniform",
                seed=0,
                status="passed",
                timing="cuda_graph",
                latency_us=Latency(median=time),
                layer_us=time - 20,
                fastest_layer_us=time - 30,
                communication_us=20.0,
                tokens_per_s=1000,
            )


def test_the_records_say_which_split_to_take(benchmark, tmp_path):
    found = benchmark.table(list(records_of(ep=(200, 300, 400), tp=(100, 300, 480))))
    rows = [line for line in found.splitlines() if re.match(r"\| \d", line)]
    assert rows[0] == (
        "| 1 | 200.0 | 100.0 | 180.0 (170.0) | 80.0 | 20.0 / 20.0 | 1,000 | 1,000 | 0.50 | tensor_parallel (best) |"
    )
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == [
        "tensor_parallel (best)", "tensor_parallel (best)", "expert_parallel (best)"
    ]  # fmt: skip
    # Laid out once: twice as fast at T = 1 outweighs a fifth at 256.
    assert "For all T together: tensor_parallel (best)" in found


def test_a_wrong_split_has_no_row(benchmark):
    records = list(records_of(ep=(200, 300, 400), tp=(100, 300, 480)))
    change = {"status": "failed", "reason": "NaN", "latency_us": None}
    records[-1] = records[-1].model_copy(update=change)
    found = benchmark.table(records)
    assert re.search(r"^\| 256 \|( \|)* tensor_parallel wrong \|$", found, re.MULTILINE)
    assert "For all T together: expert_parallel" in found  # what was wrong once isn't to be taken


def test_tables_of_files(benchmark, tmp_path):
    path = tmp_path / "records.jsonl"
    lines = [record.model_dump_json(exclude_none=True) for record in records_of((1, 2, 3), (2, 3, 4))]
    path.write_text("\n".join(lines) + "\n")
    (found,) = benchmark.tables([path])
    assert found.startswith("2 ranks, moe_fp8_block_scale_ds_routing_topk4_ng4_kg2_e8_h128_i1024, nvidia_h100")
    path.write_text("\n".join(lines[:3]) + "\n")  # nothing to compare with
    assert not list(benchmark.tables([path]))


def test_what_dispatch_takes_on_paper(benchmark, monkeypatch):
    assert benchmark.deep_ep_us(16, 128) == (118, 195)  # as published
    # Two tokens: the first one's experts on ranks 0 and 1 of 16, which are of one node; the second one's on both nodes.
    chosen = torch.tensor([[0, 1, 2, 3, 16, 17, 18, 19], [0, 1, 2, 3, 128, 129, 130, 131]])
    monkeypatch.setattr(benchmark, "route", lambda *_: (chosen, None))
    row = 7168 * (1 + 4 / 128)
    assert benchmark.deep_ep_us(16, 2) == pytest.approx((3 * row / 43e3, 3 * 7168 * 2 / 43e3))
    # In a node, ranks count: 0 and 0, 0 and 4 of 8.
    assert benchmark.deep_ep_us(8, 2) == pytest.approx((3 * row / 153e3, 3 * 7168 * 2 / 158e3))


def test_the_layers_share_on_paper(benchmark):
    fields = next(records_of(ep=(187.0,), tp=(1.0,), tokens=(128,))).model_dump(exclude_none=True)
    del fields["layer_us"]  # nothing but the layer was measured
    record = BenchRecord(**fields | {"config": {"ranks": 16, "dispatched": True}})
    assert benchmark.paper([record]).splitlines()[-1] == "| 16 | 128 | 187.0 (157.0) | 118 | 195 | 37% |"


def test_the_documented_tables_are_those_of_the_records(benchmark):
    records = ROOT / "benchmarks" / "results" / "nvidia_h100_80gb_hbm3" / "ranks"
    found = "\n".join(benchmark.tables([records / "steps.jsonl", records / "layers.jsonl"]))
    found += "\n" + benchmark.paper([r for r in read_records(records / "layers.jsonl") if r.config["dispatched"]])
    tables = re.split(r"\n\n", (ROOT / "docs" / "ranks.md").read_text())
    # Of the first the cells to both steps, which stand in another order than what follows; the others whole.
    for cells, rows in zip((3, 4, 6), (t.splitlines()[2:] for t in tables if t.startswith("| ")), strict=True):
        for row in rows:
            wanted = "|".join(row.split("|")[: cells + 1])
            assert "wrong" in wanted or wanted in found, row
