"""The peers of the benchmarks: their tiles on any machine, their kernels in the interpreter where SGLang's wheel is."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from known_clock import KnownClock

from hybrid_moe.candidate import BackendUnsupportedError
from hybrid_moe.kernels import interpreter
from hybrid_moe.kernels.grouped_gemm import libraries
from hybrid_moe.measure.readers import read_records
from hybrid_moe.measure.records import BenchRecord, append_record
from hybrid_moe.measure.timing import PeakRates
from hybrid_moe.measure.workloads import MODELS, Workload, make_inputs, random_weights
from hybrid_moe.numerics import DEFAULT_TOLERANCE, check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import dequantize_rows, has_local_work, moe_reference, quantize_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import layers
import peers
import table
from peers import sglang, sglang_deep_gemm, sglang_triton, tiles

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
WHOLE = replace(SMALL, num_local_experts=16)
H100, H200 = "NVIDIA_H100_80GB_HBM3", "NVIDIA_H200"


# ---- Tiles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """Folders in the place of SGLang's and vLLM's; ``write(package, release, gpu, tiles)`` puts a file there."""
    monkeypatch.setattr(tiles, "package_dir", lambda name: tmp_path / name)
    tiles.shipped.cache_clear()

    def write(package, release, gpu, found):
        name = tiles.file_name(MODELS["deepseek-v3-tp8"], gpu, space="" if package == "vllm" else " ")
        within = {"vllm": "model_executor/layers/fused_moe/configs"}.get(
            package, f"srt/layers/moe/moe_runner/triton_utils/configs/{release}"
        )
        path = tmp_path / package / within / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))

    yield write
    tiles.shipped.cache_clear()


def test_names_of_the_files():
    problem = MODELS["qwen3-235b-tp4"]
    rest = "dtype=fp8_w8a8,block_shape=[128,"
    assert tiles.file_name(problem, H100) == f"E=128,N=384,device_name={H100},{rest} 128].json"
    assert tiles.file_name(problem, H100, space="") == f"E=128,N=384,device_name={H100},{rest}128].json"


def test_the_newest_release_that_has_the_file(wheels):
    problem = MODELS["deepseek-v3-tp8"]
    for number, release in enumerate(("triton_3_9_0", "triton_3_10_0", "triton_3_2_0")):
        wheels("sglang", release, H100, {"8": tiles.tile(16, 64, 1, 4, number + 1)})
    wheels("sglang", "triton_3_11_0", "NVIDIA_B200", {"8": tiles.DEFAULT})
    assert tiles.shipped("sglang", problem, H100)[8]["num_stages"] == 2


def test_a_relations_file_where_a_gpu_has_none(wheels):
    problem = MODELS["deepseek-v3-tp8"]
    wheels("sglang", "triton_3_2_0", H200, {"8": tiles.tile(16, 64, 1, 4, 3)})
    assert tiles.shipped("sglang", problem, H100) == tiles.shipped("sglang", problem, H200)
    assert tiles.shipped("sglang", problem, "NVIDIA_B200") is None
    wheels("sglang", "triton_3_1_0", H100, {"8": tiles.DEFAULT})
    tiles.shipped.cache_clear()
    assert tiles.shipped("sglang", problem, H100) == {8: tiles.DEFAULT}


def test_what_is_read_of_a_file(wheels, monkeypatch):
    deep = tiles.tile(64, 128, 1, 4, 3) | {"BLOCK_SIZE_K": 256, "SPLIT_K": 1}
    wheels("vllm", "", H200, {"triton_version": "3.4.0", "1": tiles.DEFAULT, "64": deep})
    problem = MODELS["deepseek-v3-tp8"]
    monkeypatch.setattr(tiles, "gpu_name", lambda: H200)
    assert tiles.shipped("vllm", problem) == {1: tiles.DEFAULT, 64: tiles.tile(64, 128, 1, 4, 3)}
    assert tiles.named("vllm", problem, 32) == tiles.DEFAULT  # the nearest T
    assert tiles.named("vllm", problem, 33) == tiles.tile(64, 128, 1, 4, 3)
    assert tiles.named("sglang", problem, 33) is None
    assert tiles.named("default", problem, 33) == tiles.DEFAULT


def test_no_wheel_no_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "package_dir", lambda name: None)
    assert tiles.shipped.__wrapped__("sglang", SMALL, H100) is None


def test_tuned_tiles_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file.json"
    monkeypatch.setattr(tiles, "tuned_path", lambda problem: path)
    assert tiles.named("tuned", SMALL, 8) is None
    few, many = tiles.FEW_ROWS[0], tiles.MANY_ROWS[0]
    tiles.keep(path, 4096, many)
    tiles.keep(path, 1, few)
    assert tiles.load(path) == {1: few, 4096: many} and list(json.loads(path.read_text())) == ["1", "4096"]
    assert tiles.named("tuned", SMALL, 8) == few


def test_the_fastest_tile_that_is_right():
    times = {16: None, 32: 3.0, 64: 2.0}
    sweep = [tiles.tile(m, 128, 1, 4, 3) for m in times]
    assert tiles.fastest(sweep, lambda tile: times[tile["BLOCK_SIZE_M"]]) == sweep[2]
    assert tiles.fastest(sweep[:1], lambda tile: None) is None


@pytest.mark.parametrize("name", list(layers.LAYERS))
@pytest.mark.parametrize("tokens", layers.TOKENS)
def test_the_sweep(name, tokens):
    sweep = tiles.worth_trying(MODELS[name], tokens)
    assert len({tuple(tile.values()) for tile in sweep}) == len(sweep) <= 13
    assert all(tile["BLOCK_SIZE_K"] == 128 for tile in sweep)


# ---- SGLang's kernels ---------------------------------------------------------------------------------------------

needs_wheel = pytest.mark.skipif(
    torch.cuda.is_available() or sglang.package_dir("sglang") is None,
    reason="wants SGLang's wheel, installed or unpacked on PYTHONPATH, and no GPU",
)


def emulated_align(ids, experts, block, order, expert_of_block, used, scratch, pad, ignore_invalid):
    """Rows sorted by expert, each expert's padded to whole blocks; those of no local expert first, as expert -1."""
    assert pad and not ignore_invalid and scratch.numel() >= experts + 1
    flat, at = ids.flatten(), 0
    order.fill_(flat.numel())
    for expert in range(-1, experts - 1):
        rows = (flat == expert).nonzero().flatten()
        blocks = -(-len(rows) // block)
        order[at : at + len(rows)] = rows.int()
        expert_of_block[at // block : at // block + blocks] = expert
        at += blocks * block
    used.fill_(at)


def emulated_quantize(x, q, s, *how):
    assert how in ((), (128, 1e-10, -448.0, 448.0, False, False, None))
    values, scale = quantize_rows(x)
    q.copy_(values)
    s.copy_(scale.t())


def swiglu(x):
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).bfloat16()


@pytest.fixture
def emulated_ops(monkeypatch):
    """Operators of sgl-kernel that SGLang's runners call."""
    interpreter.repair()
    found = {
        "moe_align_block_size": emulated_align,
        "sgl_per_token_group_quant_8bit_v2": emulated_quantize,
        "silu_and_mul": lambda out, x: out.copy_(swiglu(x)),
        "moe_sum_reduce": lambda x, out, factor: out.copy_(x.float().sum(dim=1) * factor),
    }
    operators = SimpleNamespace(**{name: SimpleNamespace(default=function) for name, function in found.items()})
    monkeypatch.setattr(sglang, "ops", lambda: operators)


def checked(problem, tokens, prepare, seed=0):
    offset = 4 if problem.num_local_experts < problem.num_experts else 0
    inputs = make_inputs(Workload(tokens, offset, seed=seed), problem, random_weights(problem, "cpu"))
    output = torch.full((tokens, problem.hidden_size), float("nan"), dtype=torch.bfloat16)
    prepare(inputs)(output)
    result = check(
        output,
        moe_reference(inputs, problem),
        has_local_work(inputs, problem),
        DEFAULT_TOLERANCE,
        width=problem.intermediate_size,
    )
    assert result.passed, result.failures


def emulated_filtered_swiglu(x, out, tile, topk_ids):
    out[topk_ids.flatten() >= 0] = swiglu(x)[topk_ids.flatten() >= 0]


# The interpreter multiplies bfloat16 as integers, has no tensors as indices of loops, and no rank 0 tensor can be
# broadcast in Triton 3.9: the GEMM runs without swapped operands, and what surrounds it is emulated.
@needs_wheel
@pytest.mark.parametrize("problem", [SMALL, WHOLE, replace(SMALL, gate_first=True)], ids=["ep", "tp", "gate_first"])
@pytest.mark.parametrize("tokens, tile", [(1, tiles.FEW_ROWS[0]), (9, tiles.FEW_ROWS[2]), (40, tiles.DEFAULT)])
def test_sglangs_triton_kernel(monkeypatch, emulated_ops, problem, tokens, tile):
    kernels = sglang.kernels("fused_moe_triton_kernels")
    monkeypatch.setattr(kernels, "act_and_mul_triton", emulated_filtered_swiglu)
    monkeypatch.setattr(kernels, "should_enable_swap_ab", lambda m, n: False)
    monkeypatch.setattr(tiles, "DEFAULT", tile)
    checked(problem, tokens, peers.prepare_of(problem, sglang_triton.CANDIDATES[0]))


@needs_wheel
@pytest.mark.parametrize("choice", sglang_deep_gemm.CANDIDATES, ids=str)
@pytest.mark.parametrize("problem", [SMALL, WHOLE], ids=["ep", "tp"])
@pytest.mark.parametrize("tokens", [1, 9, 140])
def test_sglangs_deep_gemm_runner(monkeypatch, emulated_ops, choice, problem, tokens):
    def masked(a, b, c, counts, expected):
        assert expected == (tokens * problem.top_k - 1) // problem.num_local_experts + 1
        c.fill_(torch.nan)
        for expert, count in enumerate(counts.tolist()):
            rows = dequantize_rows(a[0][expert, :count], a[1][expert, :count].t())
            c[expert, :count] = (rows @ blocks(b[0][expert], b[1][expert]).t()).bfloat16()

    def contiguous(a, b, c, expert_of_row):
        assert expert_of_row.dtype == torch.int32 and len(expert_of_row) % 128 == 0
        rows = dequantize_rows(a[0], a[1].t())
        for expert in expert_of_row.unique().tolist():
            at = expert_of_row == expert
            c[at] = (rows[at] @ blocks(b[0][expert], b[1][expert]).t()).bfloat16()

    def scatter(hidden, hidden_scale, ids, counts, starts, rows, scale, expert_of_row, places):
        assert int(counts.sum()) == len(rows) == len(scale) == len(expert_of_row)
        start = 0
        for expert, count in enumerate(counts.tolist()):
            pairs = (ids.flatten() == expert).nonzero().flatten()
            assert len(pairs) <= count
            to = torch.arange(start, start + len(pairs))
            rows.view(torch.uint8)[to] = hidden.view(torch.uint8)[pairs // ids.shape[1]]
            scale[to] = hidden_scale[pairs // ids.shape[1]]
            places.view(-1)[pairs] = to.int()
            expert_of_row[start : start + count] = expert
            start += count

    def gather(rows, ids, weights, places, output):
        picked = rows[places.where(ids >= 0, 0).long()].float().masked_fill((ids < 0).unsqueeze(2), 0)
        output.copy_((picked * weights.unsqueeze(2)).sum(dim=1))

    def reorder(rows, output, places, ids, weights, top_k, tokens, hidden, factor):
        assert output.shape == (tokens, hidden) and ids.shape == (tokens, top_k)
        gather(rows.view(-1, hidden), ids, weights * factor, places.view_as(ids), output)

    def activate(gate_up, activated, scale, group, counts):
        for expert, count in enumerate(counts.tolist()):
            emulated_quantize(swiglu(gate_up[expert, :count]), activated[expert, :count], scale[expert, :count])

    kernels = sglang.kernels("ep_moe_kernels")
    monkeypatch.setattr(kernels, "ep_scatter", scatter)
    monkeypatch.setattr(kernels, "ep_gather", gather)
    monkeypatch.setattr(kernels, "post_reorder_deepgemm", reorder)
    monkeypatch.setattr(kernels, "silu_and_mul_masked_post_quant_fwd", activate)
    library = SimpleNamespace(fp8_m_grouped_gemm_nt_masked=masked, m_grouped_fp8_gemm_nt_contiguous=contiguous)
    layout = SimpleNamespace(get_mn_major_tma_aligned_tensor=lambda x: x)
    monkeypatch.setitem(sys.modules, "deep_gemm.utils.layout", layout)
    monkeypatch.setattr(libraries, "deep_gemm", lambda: library)
    monkeypatch.setattr(libraries, "deep_gemm_reasons", lambda device: [])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    checked(problem, tokens, peers.prepare_of(problem, choice))


def blocks(values, scale):
    return values.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


def test_a_peer_without_its_library_is_refused(monkeypatch):
    monkeypatch.setattr(sglang, "package_dir", lambda name: None)
    inputs = make_inputs(Workload(2, 4), SMALL, random_weights(SMALL, "cpu"))
    for choice in peers.CANDIDATES:
        with pytest.raises(BackendUnsupportedError) as refused:
            peers.prepare_of(SMALL, choice)(inputs)
        assert all(refused.value.reasons) and refused.value.choice == choice


# ---- The script ---------------------------------------------------------------------------------------------------


@pytest.fixture
def measure_layer(monkeypatch):
    """``measure_layer(candidates, done)`` at T = 3 with two seeds; ``spoiled`` gives wrong results with the second."""
    clock, tuned = KnownClock(), []
    monkeypatch.setattr(layers, "tune", tuned.append)
    copies = [random_weights(SMALL, "cpu", seed) for seed in range(2)]
    first = make_inputs(Workload(3, 4), SMALL, copies[0])

    def measure(candidates, done=frozenset(), spoiled=None):
        def prepare_of(problem, choice):
            def prepare(inputs):
                right = moe_reference(inputs, problem, quantize_intermediate=True)
                if choice == spoiled and not torch.equal(inputs.routing_logits, first.routing_logits):
                    right += 1

                def run(output):
                    if clock.work(1.0, 5.0):
                        output.copy_(right)

                return run

            return prepare

        monkeypatch.setattr(peers, "prepare_of", prepare_of)
        peak = PeakRates(1e12, 1e15)
        return list(layers.measured(SMALL, Workload(3, 4), 2, candidates, copies, peak, {}, done, clock))

    return measure, tuned


def test_what_a_file_has_is_not_measured_again(measure_layer, tmp_path):
    measure, tuned = measure_layer
    ours, masked, contiguous = layers.OURS[0], *sglang_deep_gemm.CANDIDATES
    path = tmp_path / "records.jsonl"
    for record in measure([layers.TUNED, masked, contiguous]):
        append_record(path, record)
    records = read_records(path)
    assert [r.choice for r in records] == [contiguous, layers.TUNED, masked]
    assert {(r.timing, r.equal_bits, r.latency_us.runs, r.seeds) for r in records} == {("cuda_graph", True, 15, 2)}
    assert len(tuned) == 1 and all(" same bits " in layers.line(r) for r in records)
    done = {r.key for r in records}
    (record,) = measure([ours, layers.TUNED, masked, contiguous], done)
    assert record.choice == ours and len(tuned) == 1
    assert not measure([ours, masked], done | {record.key})


def test_a_candidate_that_is_wrong_with_another_seed(measure_layer):
    measure, _ = measure_layer
    right, wrong = sglang_deep_gemm.CANDIDATES
    by_choice = {r.choice: r for r in measure([right, wrong], spoiled=wrong)}
    assert by_choice[right].status == "passed"
    assert by_choice[wrong].status == "failed" and by_choice[wrong].reason.startswith("seed 1, weight copy ")
    assert by_choice[wrong].latency_us is None and " failed: seed 1" in layers.line(by_choice[wrong])


def record_of(choice, us=None, **fields):
    problem = MODELS["qwen3-30b-tp2"]
    what = {"problem": problem.definition, "num_experts": 128, "backend": choice.backend, "config": dict(choice.config)}
    where = {"device": "gpu", "num_tokens": 8, "local_expert_offset": 0, "routing": "uniform", "seed": 0}
    work = {"local_rows": 64, "active_experts": 50, "timing": "cuda_graph", "floor_us": 10.0}
    how = {"status": "passed", "latency_us": {"median": us}} if us else {"status": "failed", "reason": "wrong"}
    return BenchRecord.model_validate(what | where | work | how | {"correctness": {"relative_l2": 0.02}} | fields)


def test_the_table_of_a_layer():
    ours, peer, wrong = layers.OURS[0], sglang_triton.CANDIDATES[0], sglang_deep_gemm.CANDIDATES[0]
    records = [
        record_of(ours, 12.0),
        record_of(ours, 99.0, seed=1),
        record_of(peer, 15.0),
        record_of(layers.CANDIDATES[2], 18.0),
        record_of(wrong, 11.0),
        record_of(wrong, seed=2),
        record_of(layers.OURS[1], status="unsupported"),
    ]
    head, rule, row, errors = table.table(records).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == errors.count("|") == 10
    assert row == "| 8 | 64 | 50 | 10.0 | 18.0 (1.80) | **12.0 (1.20)** | failed | 15.0 (1.50) | 1.25 |"
    assert table.title(records[0].problem, 128) == "qwen3-30b-tp2"
