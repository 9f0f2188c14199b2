"""Other libraries' grouped GEMMs: our kernels around them, and the calls, on emulations that read memory as they do."""

import dataclasses
import importlib.util
import types
from pathlib import Path

import pytest
import torch
from grouped_gemm_emulation import deep_gemm, emulated_deep_gemm, sgl_kernel

from hybrid_moe.backends.triton_fused import GEMMS, TritonFused
from hybrid_moe.device import DeviceKey
from hybrid_moe.inputs import FP8
from hybrid_moe.kernels import interpreter, pipeline
from hybrid_moe.kernels.arena import Arena
from hybrid_moe.kernels.grouped_gemm import libraries
from hybrid_moe.kernels.grouped_gemm.deep_gemm import ALIGN, DeepGemmGroupedGemm, padded_max_rows
from hybrid_moe.kernels.grouped_gemm.gather import gather
from hybrid_moe.kernels.grouped_gemm.library_rows import Rows
from hybrid_moe.kernels.grouped_gemm.sgl import FEW_ROWS, SglGroupedGemm, _shown_rows
from hybrid_moe.kernels.grouped_gemm.swiglu import swiglu
from hybrid_moe.kernels.launcher import DeviceLimits
from hybrid_moe.kernels.plan import LaunchKey, addresses_of, by_name
from hybrid_moe.kernels.routing import reserve_routing, route
from hybrid_moe.kernels.shapes import max_local_rows
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import OWN_KERNELS_TOLERANCE, check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import (
    dequantize_rows,
    has_local_work,
    local_rows_per_expert_and_token,
    moe_reference,
    quantize_rows,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")

# Odd numbers of experts, choices and 128 blocks.
SMALL = MoEProblem(
    num_experts=20,
    num_local_experts=5,
    top_k=3,
    n_group=4,
    topk_group=2,
    hidden_size=384,
    intermediate_size=256,
)
ROOT = Path(__file__).resolve().parents[1]
LIMITS = DeviceLimits(num_sms=4, pdl=False)
HOPPER = DeviceKey("gpu_x", (9, 0))
BLACKWELL = DeviceKey("gpu_y", (10, 0))


@pytest.fixture(scope="module", autouse=True)
def repaired_interpreter():
    interpreter.repair()


@pytest.fixture(autouse=True)
def forget_libraries():
    libraries._sgl_load_reasons.cache_clear()
    libraries._deep_gemm_load_reasons.cache_clear()
    yield
    libraries._sgl_load_reasons.cache_clear()
    libraries._deep_gemm_load_reasons.cache_clear()


@pytest.fixture
def sgl_library():
    with sgl_kernel():
        yield


@pytest.fixture
def deep_gemm_library():
    with deep_gemm():
        yield


# ---- Our kernels --------------------------------------------------------------------------------------------------


def routed_inputs(tokens, problem=SMALL, routing="uniform", seed=0, offset=5):
    weights = random_weights(problem, "cpu", seed)
    workload = Workload(tokens, offset, routing=routing, seed=seed)
    return make_inputs(workload, problem, weights)


def run_pieces(problem, inputs, rows, *pieces):
    """The tensors by name after ``pieces``: ``"route"``, a step that is made of a key, or what changes the tensors."""
    output = torch.empty((inputs.num_tokens, problem.hidden_size), dtype=torch.bfloat16)
    key, arena = LaunchKey.of(inputs, addresses_of(inputs), output, rows.align), Arena()
    reserve_routing(arena, problem, inputs.num_tokens)
    rows.reserve(arena)
    call = by_name(inputs, output, arena, torch.empty(arena.bytes, dtype=torch.uint8))
    for piece in pieces:
        for step in route(problem, LIMITS, key, arena) if piece == "route" else [piece(call, key)]:
            if step is not None:
                step.run(call, output.device)
    return call


def scales(tensor, rows):
    """With a row for each row."""
    return tensor if rows.row_major_scales else tensor.t()


def strided(inputs):
    """The same values in rows with gaps, and scales of a row side by side."""
    wide = torch.zeros(inputs.num_tokens, inputs.hidden_states.shape[1] + 48, dtype=torch.uint8).view(FP8)
    hidden = wide[:, 16 : 16 + inputs.hidden_states.shape[1]]
    hidden.copy_(inputs.hidden_states)
    return inputs._replace(hidden_states=hidden, hidden_states_scale=inputs.hidden_states_scale.t().contiguous().t())


def rows_of_experts(routed, problem, align):
    """``(expert, slot, token, row)`` of every pair, and the row where each expert starts and ends."""
    start, bounds, pairs = 0, [], []
    for e, count in enumerate(routed["tokens_per_expert"].tolist()):
        pairs += [(e, slot, int(routed["slot_token"][e, slot]), start + slot) for slot in range(count)]
        bounds.append((start, start + count))
        start += -(-count // align) * align
    return pairs, bounds, start


@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize("change", [lambda inputs: inputs, strided], ids=["packed", "strided"])
@pytest.mark.parametrize(
    "tokens, routing", [(1, "uniform"), (7, "uniform"), (40, "zipf"), (33, "concentrated"), (3, "none")]
)
def test_gather(tokens, routing, change, align):
    inputs = change(routed_inputs(tokens, routing=routing))
    max_rows = padded_max_rows(SMALL, tokens, align)
    rows = Rows(SMALL, max_rows, align=align, row_major_scales=align == 1, tables=True)

    def poison(call, key):
        call["gathered"].view(torch.uint8).fill_(0x7F)
        call["gathered_scale"].fill_(float("nan"))

    call = run_pieces(SMALL, inputs, rows, poison, "route", lambda call, key: gather(rows, LIMITS, key))
    gathered, gathered_scale = call["gathered"], scales(call["gathered_scale"], rows)
    pairs, bounds, total = rows_of_experts(call, SMALL, align)
    assert len(pairs) == int(local_rows_per_expert_and_token(inputs, SMALL).sum())
    assert call["start"].tolist() == [start for start, _ in bounds] + [total]
    assert call["end"].tolist() == [end for _, end in bounds]
    assert total <= max_rows
    got, wanted = gathered.view(torch.uint8), inputs.hidden_states.contiguous().view(torch.uint8)
    untouched = torch.ones(got.shape[0], dtype=torch.bool)
    for _, _, token, row in pairs:
        assert torch.equal(got[row], wanted[token])
        assert torch.equal(gathered_scale[row], inputs.hidden_states_scale[:, token])
        untouched[row] = False
    assert bool((got[untouched] == 0x7F).all()) and bool(gathered_scale[untouched].isnan().all())
    h, i = SMALL.hidden_size, SMALL.intermediate_size
    counts = call["tokens_per_expert"].tolist()
    assert call["problem_sizes"].tolist() == [[[c, 2 * i, h] for c in counts], [[c, h, i] for c in counts]]
    assert call["strides"].tolist() == [[h] * 5, [i] * 5, [2 * i] * 5]


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize("intermediate", [128, 384, 1024])
def test_swiglu(intermediate, align, gate_first):
    problem = dataclasses.replace(SMALL, intermediate_size=intermediate, gate_first=gate_first)
    counts = torch.tensor([3, 0, 130 if align > 1 else 11, 1, 0], dtype=torch.int32)
    max_rows = 5 * 128 if align > 1 else 20
    rows = Rows(problem, max_rows, align=align, row_major_scales=align == 1, tables=False)
    exist = torch.zeros(max_rows, dtype=torch.bool)
    start = 0
    for count in counts.tolist():
        exist[start : start + count] = True
        start += -(-count // align) * align
    values = torch.randn(int(exist.sum()), 2 * intermediate, generator=torch.Generator().manual_seed(1)) * 3
    values[0] = 0.0

    def fill(call, key):
        call["tokens_per_expert"].copy_(counts)
        call["gemm1"].fill_(float("nan"))
        call["gemm1"][exist] = values.bfloat16()
        call["activated"].view(torch.uint8).fill_(0x55)
        call["activated_scale"].fill_(-1.0)

    call = run_pieces(problem, routed_inputs(1, problem), rows, fill, lambda call, key: swiglu(rows, LIMITS))
    activated, activated_scale = call["activated"], scales(call["activated_scale"], rows)

    first, second = values.bfloat16().float().split(intermediate, dim=1)
    up, gate = (second, first) if gate_first else (first, second)
    wanted, scale = quantize_rows(torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(activated_scale[exist], scale.t(), rtol=1e-5, atol=0)
    got = dequantize_rows(activated[exist], activated_scale[exist].t())
    # One step of e4m3, where exp() rounds differently.
    torch.testing.assert_close(got, dequantize_rows(wanted, scale), rtol=0.13, atol=1e-4)
    assert float((got - dequantize_rows(wanted, scale)).norm() / got.norm()) < 1e-3
    assert bool((activated.view(torch.uint8)[~exist] == 0x55).all())
    assert bool((activated_scale[~exist] == -1.0).all())


# ---- The providers ------------------------------------------------------------------------------------------------

CASES = [
    (1, "uniform", False),
    (7, "uniform", True),
    (40, "zipf", False),
    (130, "concentrated", False),  # more than a tile of 128 rows for an expert
    (5, "none", False),
]


def run_and_check(gemm, tokens, routing, gate_first, change=lambda inputs: inputs):
    problem = dataclasses.replace(SMALL, gate_first=gate_first)
    workload = Workload(tokens, 5, routing=routing, seed=tokens)
    inputs = change(make_inputs(workload, problem, random_weights(problem, "cpu", tokens)))
    output = torch.full((tokens, problem.hidden_size), float("nan"), dtype=torch.bfloat16)
    pipeline.Pipeline(problem, gemm).run(inputs, output)
    result = check(output, moe_reference(inputs, problem), has_local_work(inputs, problem), OWN_KERNELS_TOLERANCE)
    assert result.passed, result.failures


@pytest.mark.parametrize("tokens, routing, gate_first", CASES)
def test_sgl_kernel(sgl_library, tokens, routing, gate_first):
    run_and_check(SglGroupedGemm(), tokens, routing, gate_first)


@pytest.mark.parametrize("tokens, routing, gate_first", CASES)
def test_deep_gemm(deep_gemm_library, tokens, routing, gate_first):
    run_and_check(DeepGemmGroupedGemm(), tokens, routing, gate_first)


def test_sgl_kernel_sees_few_rows_where_few_are_expected(sgl_library, monkeypatch):
    full = MoEProblem()
    max_rows = {tokens: max_local_rows(full, tokens) for tokens in (1, 256, 512, 513, 14107)}
    shown = {tokens: _shown_rows(full, tokens, rows) for tokens, rows in max_rows.items()}
    assert shown == {1: 8, 256: FEW_ROWS, 512: FEW_ROWS, 513: max_rows[513], 14107: max_rows[14107]}
    # Fewer rows shown than there are: the result is the same.
    from hybrid_moe.kernels.grouped_gemm import sgl as sgl_gemm

    monkeypatch.setattr(sgl_gemm, "FEW_ROWS", 4)
    run_and_check(SglGroupedGemm(), 40, "zipf", False)


def test_workspace_bytes():
    full = MoEProblem()
    per_row = 7168 + 2 * 4096 + 2048 + (56 + 16) * 4
    assert per_row == 17_696
    sgl, deep = (pipeline.Pipeline(full, gemm()).arena(14107).bytes for gemm in (SglGroupedGemm, DeepGemmGroupedGemm))
    routing = 4 * (32 * 14108 + 2 * 14107 * 8)
    assert 0 < sgl - routing - 112_856 * per_row < 200_000
    assert 0 < deep - routing - 116_864 * per_row < 5000


@pytest.mark.parametrize("tokens", [1, 2, 5, 200])
def test_padded_capacity_is_the_worst_routing(tokens):
    rows, experts = max_local_rows(SMALL, tokens), SMALL.num_local_experts
    worst = 0
    # One row more than a full tile for as many experts as the rows allow, the rest in whole tiles for the last.
    for active in range(1, min(rows, experts) + 1):
        left = rows - (active - 1)
        worst = max(worst, (active - 1) * ALIGN + -(-left // ALIGN) * ALIGN)
    assert padded_max_rows(SMALL, tokens, ALIGN) >= worst
    assert padded_max_rows(SMALL, tokens, ALIGN) - worst <= ALIGN


# ---- Refusals -----------------------------------------------------------------------------------------------------


def hide(monkeypatch, *names):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else found(name, *rest))


def install(monkeypatch, name, load):
    """Make ``name`` look installed; ``load()`` is called where it would be imported."""
    found, imported = importlib.util.find_spec, importlib.import_module
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: object() if n == name else found(n, *rest))
    monkeypatch.setattr(importlib, "import_module", lambda n, *rest: load() if n == name else imported(n, *rest))


def never():
    raise AssertionError("loaded before the capability was asked")


def fail(error):
    def load():
        raise error

    return load


def test_capability_comes_before_the_library(monkeypatch):
    install(monkeypatch, "sgl_kernel", never)
    install(monkeypatch, "deep_gemm", never)
    old, cpu = DeviceKey("gpu_z", (8, 0)), DeviceKey("cpu")
    (reason,) = SglGroupedGemm().not_supported_reasons(SMALL, old)
    assert reason == "device gpu_z: expected compute capability 9.0 or 10.0 or 10.3, got 8.0"
    (reason,) = DeepGemmGroupedGemm().not_supported_reasons(SMALL, BLACKWELL)
    assert reason == "device gpu_y: expected compute capability 9.0, got 10.0"
    for gemm in (SglGroupedGemm(), DeepGemmGroupedGemm()):
        (reason,) = gemm.not_supported_reasons(SMALL, cpu)
        assert "device cpu: expected compute capability 9.0" in reason and reason.endswith("got none")


def test_missing_libraries(monkeypatch):
    hide(monkeypatch, "sgl_kernel", "deep_gemm")
    (reason,) = SglGroupedGemm().not_supported_reasons(SMALL, HOPPER)
    assert reason == "sgl_kernel is not installed: pip install 'hybrid-moe[sgl]'"
    (reason,) = DeepGemmGroupedGemm().not_supported_reasons(SMALL, HOPPER)
    assert reason == "deep_gemm is not installed: pip install 'hybrid-moe[deepgemm]'"


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, AssertionError])
@pytest.mark.parametrize("name, gemm", [("sgl_kernel", SglGroupedGemm), ("deep_gemm", DeepGemmGroupedGemm)])
def test_a_library_that_does_not_load(monkeypatch, name, gemm, error):
    install(monkeypatch, name, fail(error("undefined symbol: x\nand more")))
    (reason,) = gemm().not_supported_reasons(SMALL, HOPPER)
    assert reason == f"{name} doesn't load: undefined symbol: x"


def test_a_bug_in_a_library_is_no_reason(monkeypatch):
    install(monkeypatch, "sgl_kernel", fail(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        SglGroupedGemm().not_supported_reasons(SMALL, HOPPER)


def test_libraries_without_the_function(monkeypatch):
    install(monkeypatch, "sgl_kernel", lambda: None)
    (reason,) = SglGroupedGemm().not_supported_reasons(SMALL, HOPPER)
    assert reason.startswith("this sgl_kernel has no op fp8_blockwise_scaled_grouped_mm")
    old = types.SimpleNamespace(m_grouped_fp8_gemm_nt_contiguous=lambda a, b, d, m_indices: None)
    for module in (types.SimpleNamespace(), old):
        libraries._deep_gemm_load_reasons.cache_clear()
        with monkeypatch.context() as patch:
            install(patch, "deep_gemm", lambda module=module: module)
            (reason,) = DeepGemmGroupedGemm().not_supported_reasons(SMALL, HOPPER)
            assert "with use_psum_layout: pip install" in reason


def test_deep_gemm_wants_a_compiler(monkeypatch, tmp_path):
    install(
        monkeypatch, "deep_gemm", lambda: types.SimpleNamespace(m_grouped_fp8_gemm_nt_contiguous=emulated_deep_gemm)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("DG_JIT_USE_NVRTC", raising=False)
    (reason,) = DeepGemmGroupedGemm().not_supported_reasons(SMALL, HOPPER)
    assert "nvcc" in reason and "CUDA_HOME" in reason
    libraries._deep_gemm_load_reasons.cache_clear()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert DeepGemmGroupedGemm().not_supported_reasons(SMALL, HOPPER) == []


def test_an_op_that_is_there_already_needs_no_package(monkeypatch, sgl_library):
    hide(monkeypatch, "sgl_kernel")
    assert SglGroupedGemm().not_supported_reasons(SMALL, HOPPER) == []
    assert SglGroupedGemm().not_supported_reasons(MoEProblem(), BLACKWELL) == []
    many = MoEProblem(num_experts=2048, num_local_experts=2048)
    (reason,) = SglGroupedGemm().not_supported_reasons(many, HOPPER)
    assert reason == "num_local_experts: expected at most 1024, got 2048"


def test_each_gemm_is_a_candidate(monkeypatch):
    hide(monkeypatch, "sgl_kernel", "deep_gemm")
    backend = TritonFused()
    configs = list(backend.configs())
    assert configs == [{"gemm": gemm} for gemm in GEMMS] and configs[0] == backend.default_config
    reasons = {c["gemm"]: backend.not_supported_reasons(MoEProblem(), HOPPER, c) for c in configs}
    assert reasons["triton"] == []
    assert len(reasons["sgl_kernel"]) == len(reasons["deep_gemm"]) == 1
