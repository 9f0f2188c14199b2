"""The flashinfer_cutlass backend without flashinfer: its kernels, refusals, the contract with the releases, layouts."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import cutlass_emulation
import pytest
import torch
from fake_flashinfer import CUTLASS, forgotten, inputs_of_any_sign, signature_of, tools_in, write_cutlass_package
from given_routing import random_choice

from hybrid_moe import backends, fused_moe
from hybrid_moe.backends import flashinfer_cutlass, flashinfer_package
from hybrid_moe.backends.flashinfer_cutlass import FlashinferCutlass, layer_arguments, passed
from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.inputs import FP8, MoEInputs, RoutedInputs
from hybrid_moe.kernels.external import external_inputs
from hybrid_moe.kernels.launcher import limits_of
from hybrid_moe.measure.workloads import Workload, random_weights
from hybrid_moe.measure.workloads import make_inputs as inputs_of_workload
from hybrid_moe.numerics import DEFAULT_TOLERANCE, Tolerance, check
from hybrid_moe.policy.versions import packages_of
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work, moe_reference, route

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H200 = DeviceKey("nvidia_h200", (9, 0))
B200 = DeviceKey("nvidia_b200", (10, 0))
DEEPSEEK_V3 = MoEProblem()
SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
# Activations are rounded to fp8 before each GEMM; with an inner size of 128 and few tokens that gives a relative L2 of
# up to 0.06. A wrong layout gives about 1.
TOLERANCE = Tolerance(max_relative_l2=0.08)
RECORDED = json.loads((Path(__file__).parent / "data" / "flashinfer_cutlass_signatures.json").read_text())
VERSIONS = list(RECORDED["versions"])
NEWEST = VERSIONS[-1]


def recorded_signature(version: str) -> inspect.Signature:
    """The signature of that release."""
    return signature_of(RECORDED["versions"][version])


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A machine that has nvcc and ninja; what a test removes from the folder is missing."""
    with tools_in(tmp_path / "tools") as folder:
        yield folder


@pytest.fixture
def fake_flashinfer(tmp_path, monkeypatch, tools):
    """Install a package flashinfer of a given version, state of its module and CUDA; its function is the code given."""

    def install(code: str = CUTLASS, version: str = NEWEST, **state) -> None:
        write_cutlass_package(tmp_path, code, version, **state)
        monkeypatch.syspath_prepend(tmp_path)

    with forgotten():
        yield install


@pytest.fixture
def on_this_device(monkeypatch):
    """The backend runs on the tensors' device, whatever it is, and nothing of it stays memoised."""
    monkeypatch.setattr(flashinfer_cutlass, "CAPABILITIES", (DeviceKey.of(DEVICE).capability,))
    for memo in (backends.not_supported_reasons, backends.prepare):
        memo.cache_clear()
    yield
    for memo in (backends.not_supported_reasons, backends.prepare):
        memo.cache_clear()


def make_inputs(tokens: int, offset: int, problem: MoEProblem = SMALL, seed: int = 0) -> MoEInputs:
    return inputs_of_any_sign(tokens, offset, problem, seed, DEVICE)


def poison(tokens: int, problem: MoEProblem = SMALL) -> torch.Tensor:
    return torch.full((tokens, problem.hidden_size), float("nan"), dtype=torch.bfloat16, device=DEVICE)


def external_of(inputs: MoEInputs, problem: MoEProblem):
    return external_inputs(inputs, problem, limits_of(DEVICE))


# The kernels before the call


@pytest.mark.parametrize("hidden_size", [128, 384, 1024, 2048])
def test_dequantized_activations(hidden_size):
    problem = MoEProblem(num_experts=8, num_local_experts=8, top_k=2, n_group=1, topk_group=1, hidden_size=hidden_size)
    inputs = make_inputs(7, 0, MoEProblem(**{**vars_of(problem), "intermediate_size": 128}))
    x = external_of(inputs, problem).hidden_states
    wanted = inputs.hidden_states.float() * inputs.hidden_states_scale.t().repeat_interleave(128, dim=1)
    assert x.dtype == torch.bfloat16 and x.is_contiguous()
    # The interpreter cuts float32 off to bf16 where a GPU rounds.
    torch.testing.assert_close(x.float(), wanted, rtol=2**-8 if DEVICE.type == "cuda" else 2**-7, atol=0)


def vars_of(problem: MoEProblem) -> dict:
    return {name: getattr(problem, name) for name in problem.__slots__}


def test_strided_activations_and_scales():
    inputs = make_inputs(5, 0)
    wanted = external_of(inputs, SMALL).hidden_states
    wide = torch.cat([inputs.hidden_states.float()] * 2, dim=1).to(FP8)
    strided = inputs._replace(
        hidden_states=wide[:, : SMALL.hidden_size], hidden_states_scale=inputs.hidden_states_scale.t().contiguous().t()
    )
    assert not strided.hidden_states.is_contiguous()
    assert torch.equal(external_of(strided, SMALL).hidden_states, wanted)
    unaligned = inputs._replace(routing_logits=torch.cat([inputs.routing_logits[:1, :1].expand(5, 1)] * 17, 1)[:, 1:])
    assert unaligned.routing_logits.data_ptr() % 16 and not unaligned.routing_logits.is_contiguous()
    experts = external_of(unaligned, SMALL).experts
    assert torch.equal(
        experts, external_of(unaligned._replace(routing_logits=unaligned.routing_logits.clone()), SMALL)[1]
    )


@pytest.mark.parametrize("offset", [0, 5, 12])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_experts": 24, "num_local_experts": 6, "top_k": 3, "n_group": 3},
        {"num_experts": 15, "num_local_experts": 3, "top_k": 5, "n_group": 5, "topk_group": 3},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 1, "topk_group": 1, "routing_method": "softmax"},
    ],
)
def test_experts_are_counted_from_the_first_local_one(fields, offset):
    problem = MoEProblem(**{**vars_of(SMALL), **fields})
    inputs = make_inputs(9, offset, problem)
    _, experts, weights = external_of(inputs, problem)
    ids, wanted = route(inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor, problem)
    assert experts.dtype == torch.int32 and weights.dtype == torch.float32
    back = (experts.long() + offset) % problem.num_experts
    assert bool(((0 <= experts) & (experts < problem.num_experts)).all())
    assert torch.equal(back, ids)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [{}, {"num_local_experts": 16}, {"num_experts": 15, "n_group": 5, "top_k": 5}])
def test_given_experts_are_counted_from_the_first_local_one(fields):
    problem = MoEProblem(**{**vars_of(SMALL), **fields})
    offset = (problem.num_experts - problem.num_local_experts) // 2
    inputs = make_inputs(9, offset, problem)
    ids, given = random_choice(problem, 9)
    ids[0, :2] = offset  # twice: it comes once, with the sum of the weights
    routed = RoutedInputs(ids.to(DEVICE), given.to(DEVICE), *inputs[2:])
    hidden, experts, weights = external_of(routed, problem)
    assert torch.equal(hidden, external_of(inputs, problem).hidden_states)
    none = (ids < 0) | (ids >= problem.num_experts)
    none[0, 1] = True
    assert torch.equal(experts.cpu() == problem.num_experts, none)
    back = (experts.cpu().long() + offset) % problem.num_experts
    assert torch.equal(back[~none], ids[~none].long())
    assert bool(((0 <= experts) & (experts <= problem.num_experts)).all())
    given[0, 0] += given[0, 1]
    assert torch.equal(weights.cpu(), torch.where(none, 0.0, given))


def test_a_bias_in_float32():
    inputs = make_inputs(9, 0)
    fine = inputs._replace(routing_bias=8 + torch.rand(16, generator=torch.Generator().manual_seed(1)).to(DEVICE) / 16)
    for given in (fine, inputs, fine._replace(routing_bias=fine.routing_bias.bfloat16()), fine):
        ids, _ = route(given.routing_logits, given.routing_bias, given.routed_scaling_factor, SMALL)
        assert torch.equal(external_of(given, SMALL).experts.long(), ids)


# Refusals


def test_supported_where_it_should_be(fake_flashinfer):
    fake_flashinfer()
    assert FlashinferCutlass().not_supported_reasons(DEEPSEEK_V3, H200, {}) == []
    # Whatever the routing, the offset and the number of ranks: they are this package's.
    odd = MoEProblem(num_experts=120, num_local_experts=25, n_group=12, topk_group=7)
    assert FlashinferCutlass().not_supported_reasons(odd, H200, {}) == []


@pytest.mark.parametrize("capability", [None, (10, 0), (10, 3), (8, 9), (12, 0)])
def test_other_devices_are_refused_without_importing_flashinfer(fake_flashinfer, capability):
    fake_flashinfer("raise AssertionError('imported')", before="raise AssertionError('called')")
    device = DeviceKey("some_device", capability)
    (reason,) = FlashinferCutlass().not_supported_reasons(DEEPSEEK_V3, device, {})
    assert reason.startswith("compute capability of some_device: expected 9.0, got ")
    with pytest.raises(BackendUnsupportedError, match=r"flashinfer_cutlass can't run here: compute capability"):
        FlashinferCutlass().prepare(DEEPSEEK_V3, device, {})
    assert "flashinfer" not in sys.modules


def test_all_reasons_are_reported(monkeypatch, tools):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *r: None if name == "flashinfer" else find_spec(name, *r)
    )
    reasons = FlashinferCutlass().not_supported_reasons(MoEProblem(gate_first=True), B200, {"gemm": "triton"})
    for part in (
        "nvidia_b200: expected 9.0, got 10.0",
        "pip install 'flashinfer-python>=0.6.14,<0.8'",
        "gate_first is True",
        "option 'gemm' is unknown",
    ):
        assert [r for r in reasons if part in r], (part, reasons)
    assert len(reasons) == 4


def test_a_release_out_of_the_range_is_refused_without_importing_it(fake_flashinfer):
    fake_flashinfer("raise AssertionError('imported')", version="0.8.0", before="raise AssertionError('called')")
    (reason,) = FlashinferCutlass().not_supported_reasons(DEEPSEEK_V3, H200, {})
    assert reason == "flashinfer-python: expected >=0.6.14,<0.8, got 0.8.0"
    assert "flashinfer" not in sys.modules


def test_packages_that_its_speed_hangs_on():
    assert packages_of(Candidate("flashinfer_cutlass")) == ("torch", "triton", "flashinfer-python")


def test_without_nvcc(fake_flashinfer, tools, monkeypatch, tmp_path):
    fake_flashinfer()
    ask = FlashinferCutlass().not_supported_reasons
    (tools / "nvcc").rename(tools / "nvcc-13")
    (reason,) = ask(DEEPSEEK_V3, H200, {})
    assert "nvcc isn't found" in reason and "CUDA_HOME" in reason
    # As DeepGEMM looks for it: CUDA_HOME goes before the search path, a name of its own before both.
    monkeypatch.setenv("TRTLLM_DG_NVCC_COMPILER", str(tools / "nvcc-13"))
    assert ask(DEEPSEEK_V3, H200, {}) == []
    monkeypatch.delenv("TRTLLM_DG_NVCC_COMPILER")
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tools / "nvcc-13").rename(tools / "nvcc")
    assert len(ask(DEEPSEEK_V3, H200, {})) == 1
    (tools / "nvcc").rename(tmp_path / "cuda" / "bin" / "nvcc")
    assert ask(DEEPSEEK_V3, H200, {}) == []


def test_an_old_cuda_is_refused(fake_flashinfer):
    fake_flashinfer(cuda="12.6")
    (reason,) = FlashinferCutlass().not_supported_reasons(DEEPSEEK_V3, H200, {})
    assert reason == "CUDA: expected 12.8 or newer, got 12.6"


def test_a_module_that_is_neither_built_nor_can_be(fake_flashinfer, tools, monkeypatch):
    fake_flashinfer(is_aot=False, sources=(__file__, "/nowhere/a.cu", "/nowhere/b.cu"))
    ask = FlashinferCutlass().not_supported_reasons
    (reason,) = ask(DEEPSEEK_V3, H200, {})
    assert reason.startswith("flashinfer's module fused_moe_90 isn't built ahead")
    assert reason.endswith("can't be built: its source /nowhere/a.cu is missing")
    (tools / "ninja").unlink()
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    (reason,) = ask(DEEPSEEK_V3, H200, {})
    assert "pip install ninja; FLASHINFER_DISABLE_JIT is set; its source" in reason


def test_a_module_built_ahead_needs_nothing_to_build_it(fake_flashinfer, tools, monkeypatch):
    fake_flashinfer(is_aot=True, sources=("/nowhere/a.cu",))
    (tools / "ninja").unlink()
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert FlashinferCutlass().not_supported_reasons(DEEPSEEK_V3, H200, {}) == []


@pytest.mark.parametrize(
    ("is_aot", "is_compiled", "said"),
    [
        (True, True, "is built ahead: /somewhere/fused_moe_90.so"),
        (False, True, "was built here: /somewhere/fused_moe_90.so"),
        (False, False, "isn't built: the first call does it, in ten minutes or more (1 units)"),
    ],
)
def test_a_remark_says_whether_the_module_is_built(fake_flashinfer, is_aot, is_compiled, said):
    fake_flashinfer(is_aot=is_aot, is_compiled=is_compiled, sources=(__file__,))
    backend = FlashinferCutlass()
    assert backend.not_supported_reasons(DEEPSEEK_V3, H200, {}) == []
    (remark,) = backend.remarks(DEEPSEEK_V3, H200, {})
    assert said in remark


def test_doctor_shows_the_remark(fake_flashinfer, on_this_device, monkeypatch):
    from typer.testing import CliRunner

    from hybrid_moe.cli import app

    fake_flashinfer()
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False).stdout)
    (row,) = [row for row in report["backends"] if row["backend"] == "flashinfer_cutlass"]
    assert row["works"] and row["reasons"] == []
    assert row["remarks"] == ["flashinfer's module fused_moe_90 is built ahead: /somewhere/fused_moe_90.so"]
    monkeypatch.setenv("COLUMNS", "200")
    assert "is built ahead" in CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout


@pytest.mark.parametrize("before", ["raise RuntimeError('no cache')", "raise OSError('no cache')"])
def test_a_flashinfer_that_cannot_describe_its_module_is_refused(fake_flashinfer, before):
    fake_flashinfer(before=before)
    (reason,) = FlashinferCutlass().not_supported_reasons(DEEPSEEK_V3, H200, {})
    assert reason == f"flashinfer-python {NEWEST} can't be used: no cache"


def test_a_flashinfer_that_cannot_be_imported_is_refused(fake_flashinfer):
    fake_flashinfer("import a_missing_dependency")
    with pytest.raises(BackendUnsupportedError, match="can't be imported: No module named 'a_missing_dependency'"):
        FlashinferCutlass().prepare(DEEPSEEK_V3, H200, {})


@pytest.mark.parametrize(("code", "before"), [("1 / 0", "pass"), ("", "1 / 0")])
def test_a_bug_inside_flashinfer_is_not_taken_for_a_refusal(fake_flashinfer, code, before):
    fake_flashinfer(code, before=before)
    with pytest.raises(ZeroDivisionError):
        FlashinferCutlass().prepare(DEEPSEEK_V3, H200, {})


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("", f"flashinfer-python {NEWEST} has no flashinfer.fused_moe.cutlass_fused_moe"),
        ("def cutlass_fused_moe(input, **rest): ...", "takes no argument 'output', which this"),
        ("def cutlass_fused_moe(input, other): ...", "wants an argument 'other', which this"),
    ],
)
def test_a_changed_function_is_refused_when_prepared(fake_flashinfer, code, reason):
    fake_flashinfer(code)
    with pytest.raises(BackendUnsupportedError, match=re.escape(reason)):
        FlashinferCutlass().prepare(DEEPSEEK_V3, H200, {})


# The contract with flashinfer's releases


def call_arguments(version: str) -> dict:
    """The keyword arguments of a real call of the runner, to a function with that release's signature."""
    seen = {}

    def moe(**arguments) -> None:
        seen.update(arguments)

    moe.__signature__ = recorded_signature(version)
    flashinfer_cutlass._CutlassRunner(moe, SMALL).run(make_inputs(3, 4), poison(3))
    return seen


@pytest.mark.parametrize("version", VERSIONS)
def test_the_call_fits_the_signature(version):
    signature = recorded_signature(version)
    arguments = call_arguments(version)
    assert flashinfer_package.contract_reasons("f", signature, passed(SMALL)) == []
    bound = signature.bind(**arguments)  # TypeError if an argument is unknown or missing
    assert set(bound.arguments) == set(arguments)
    assert set(arguments) - passed(SMALL) == ({"profile_ids"} & set(signature.parameters))
    # What isn't passed is left at a default that means the definition.
    for name, default in (
        ("activation_type", "ActivationType.Swiglu"),
        ("tp_size", "1"),
        ("cluster_size", "1"),
        ("enable_alltoall", "False"),
        ("min_latency_mode", "False"),
    ):
        assert name not in arguments and signature.parameters[name].default == default


@pytest.mark.parametrize("version", VERSIONS)
def test_a_signature_without_any_of_our_arguments_is_noticed(version):
    signature = recorded_signature(version)
    for name in passed(SMALL):
        parameters = [p for p in signature.parameters.values() if p.name != name]
        (reason,) = flashinfer_package.contract_reasons("f", signature.replace(parameters=parameters), passed(SMALL))
        assert f"takes no argument {name!r}" in reason


def test_the_recorded_releases_are_those_of_the_range():
    first, excluded = flashinfer_package.VERSION_RANGE.removeprefix(">=").split(",<")
    assert VERSIONS[0] == first
    assert len(VERSIONS) == len(set(VERSIONS)) and not any(v.startswith(excluded) for v in VERSIONS)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer isn't installed")
def test_the_call_fits_the_installed_flashinfer():
    module = pytest.importorskip("flashinfer.fused_moe")
    signature = inspect.signature(module.cutlass_fused_moe)
    assert flashinfer_package.contract_reasons("f", signature, passed(SMALL)) == []


def test_the_emulation_has_the_newest_release_s_arguments():
    emulated = inspect.signature(cutlass_emulation.cutlass_fused_moe).parameters
    recorded = recorded_signature(NEWEST).parameters
    assert [(p.name, p.kind) for p in emulated.values()] == [(p.name, p.kind) for p in recorded.values()]


def test_arguments_of_the_definition():
    assert layer_arguments(DEEPSEEK_V3) == {
        "output_dtype": torch.bfloat16,
        "ep_size": 8,
        "ep_rank": 0,
        "use_deepseek_fp8_block_scale": True,
        "enable_pdl": True,
    }


# Results


def moe(inputs: MoEInputs, problem: MoEProblem, output: torch.Tensor) -> None:
    """The public call."""
    fused_moe(
        *inputs,
        top_k=problem.top_k,
        n_group=problem.n_group,
        topk_group=problem.topk_group,
        output=output,
        backend="flashinfer_cutlass",
    )


@pytest.mark.parametrize("full_range", [True, False])
def test_within_the_default_tolerance(fake_flashinfer, on_this_device, full_range):
    """Also with experts that are no multiple of the local ones.

    Activations that fill the range of e4m3, as quantised ones do, come through being quantised again.
    """
    fake_flashinfer()
    problem = MoEProblem(
        num_experts=24, num_local_experts=7, top_k=4, n_group=4, topk_group=2, hidden_size=512, intermediate_size=256
    )
    inputs = inputs_of_workload(Workload(32, 11), problem, random_weights(problem, DEVICE))
    if not full_range:
        generator = torch.Generator().manual_seed(0)
        hidden_states = torch.randn(32, 512, generator=generator).to(FP8).to(DEVICE)
        inputs = inputs._replace(hidden_states=hidden_states)
    output = poison(32, problem)
    moe(inputs, problem, output)
    verdict = check(output, moe_reference(inputs, problem), has_local_work(inputs, problem), DEFAULT_TOLERANCE)
    assert verdict.passed, verdict.failures
    assert (verdict.relative_l2 < 0.03) == full_range


def test_the_emulation_can_tell_a_wrong_layout(fake_flashinfer):
    """The result's test has teeth: halves swapped, scales transposed, another rank's offset, no scaling factor."""
    fake_flashinfer()
    runner = FlashinferCutlass().prepare(SMALL, H200, {})
    inputs = make_inputs(5, 4)
    reference, local = moe_reference(inputs, SMALL), has_local_work(inputs, SMALL)
    assert local.any()
    half = SMALL.intermediate_size
    scale = inputs.hidden_states_scale
    for wrong in (
        inputs._replace(gemm1_weights=torch.cat([inputs.gemm1_weights[:, half:], inputs.gemm1_weights[:, :half]], 1)),
        inputs._replace(hidden_states_scale=scale.t().reshape(scale.shape)),
        inputs._replace(local_expert_offset=5),
        inputs._replace(routed_scaling_factor=1.0),
    ):
        output = poison(5)
        runner.run(wrong, output)
        assert check(output, reference, local).relative_l2 > 0.3


def test_weights_that_the_hardware_cannot_read_are_an_error(fake_flashinfer):
    fake_flashinfer()
    runner = FlashinferCutlass().prepare(SMALL, H200, {})
    inputs = make_inputs(2, 0)
    weights = inputs.gemm2_weights
    shifted = torch.empty(weights.numel() + 1, dtype=FP8, device=DEVICE)[1:].view(weights.shape)
    with pytest.raises(ValueError, match=r"gemm2_weights doesn't start at a multiple of 16 bytes.*\.clone\(\)"):
        runner.run(inputs._replace(gemm2_weights=shifted), poison(2))


def test_workspace():
    runner = flashinfer_cutlass._CutlassRunner(cutlass_emulation.cutlass_fused_moe, DEEPSEEK_V3)
    # At T = 4: 32 rows. Activations and routing, maps, the two GEMMs' overlapped buffers, quantised rows with scales.
    external, maps = 4 * 7168 * 2 + 32 * 8, 4 * (4 * 32 + 2 * 32 * 4)
    assert runner.workspace_bytes(4) == external + maps + 32 * (7168 + 4096) * 2 + 32 * 7168 + 1024 * 56 * 4
    assert 3.3e9 < runner.workspace_bytes(14107) < 3.8e9
