"""The flashinfer_trtllm backend without flashinfer: refusals, the contract with its releases, tensor layouts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import trtllm_emulation
from fake_flashinfer import forgotten, inputs_of_any_sign, signature_of, write_package

from hybrid_moe.backends import flashinfer_package, flashinfer_trtllm
from hybrid_moe.backends.flashinfer_trtllm import FlashinferTrtllm, contract_reasons, layer_arguments
from hybrid_moe.candidate import BackendUnsupportedError
from hybrid_moe.device import DeviceKey
from hybrid_moe.inputs import MoEInputs
from hybrid_moe.measure.workloads import GLM_4_5_AIR, KIMI_K2
from hybrid_moe.numerics import Tolerance, check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work, moe_reference

B200 = DeviceKey("nvidia_b200", (10, 0))
H100 = DeviceKey("nvidia_h100_80gb_hbm3", (9, 0))
DEEPSEEK_V3 = MoEProblem()
SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=128
)
# GEMM1's result is rounded to fp8 before SwiGLU and after it; with an inner size of 128 and few tokens that alone gives
# a relative L2 of up to 0.06. A wrong layout gives about 1.
TOLERANCE = Tolerance(max_relative_l2=0.08)
RECORDED = json.loads((Path(__file__).parent / "data" / "flashinfer_signatures.json").read_text())
VERSIONS = list(RECORDED["versions"])
NEWEST = VERSIONS[-1]


def recorded_signature(version: str) -> inspect.Signature:
    """The signature of that release."""
    return signature_of(RECORDED["versions"][version])


@pytest.fixture
def fake_flashinfer(tmp_path, monkeypatch):
    """Install a package flashinfer of a given version, whose function is the code given."""

    def install(
        code: str = "from trtllm_emulation import trtllm_fp8_block_scale_moe",
        version: str = NEWEST,
        package: str = "flashinfer-python",
    ) -> None:
        write_package(tmp_path, code, version, package)
        monkeypatch.syspath_prepend(tmp_path)

    with forgotten():
        yield install


@pytest.fixture
def no_flashinfer(monkeypatch):
    """As if flashinfer weren't installed, whether it is or not."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "flashinfer" else find_spec(name, *rest)
    )


def make_inputs(tokens: int, offset: int, problem: MoEProblem = SMALL, seed: int = 0) -> MoEInputs:
    return inputs_of_any_sign(tokens, offset, problem, seed)


def poison(tokens: int, problem: MoEProblem = SMALL) -> torch.Tensor:
    return torch.full((tokens, problem.hidden_size), float("nan"), dtype=torch.bfloat16)


# Refusals


def test_supported_where_it_should_be(fake_flashinfer):
    fake_flashinfer()
    for capability in ((10, 0), (10, 3)):
        device = DeviceKey("nvidia_gb300", capability)
        assert FlashinferTrtllm().not_supported_reasons(DEEPSEEK_V3, device, {}) == []


@pytest.mark.parametrize("capability", [None, (9, 0), (10, 7), (12, 0), (8, 0)])
def test_other_devices_are_refused_without_importing_flashinfer(fake_flashinfer, capability):
    fake_flashinfer("raise AssertionError('imported')")
    device = DeviceKey("some_device", capability)
    backend = FlashinferTrtllm()
    (reason,) = backend.not_supported_reasons(DEEPSEEK_V3, device, {})
    assert "compute capability of some_device: expected 10.0 or 10.3" in reason
    with pytest.raises(BackendUnsupportedError, match=r"flashinfer_trtllm can't run here: compute capability"):
        backend.prepare(DEEPSEEK_V3, device, {})
    assert "flashinfer" not in sys.modules


def test_asking_for_reasons_never_imports_flashinfer(fake_flashinfer):
    fake_flashinfer("raise AssertionError('imported')")
    assert FlashinferTrtllm().not_supported_reasons(DEEPSEEK_V3, B200, {}) == []
    assert "flashinfer" not in sys.modules


def test_all_reasons_are_reported(no_flashinfer):
    problem = MoEProblem(num_experts=96, num_local_experts=96, top_k=10, n_group=16, topk_group=5, gate_first=True)
    reasons = FlashinferTrtllm().not_supported_reasons(problem, H100, {"gemm": "triton"})
    for part in (
        "nvidia_h100_80gb_hbm3: expected 10.0 or 10.3, got 9.0",
        "pip install 'flashinfer-python>=0.6.14,<0.8'",
        "gate_first is True",
        "n_group: expected at most 8, got 16",
        "topk_group: expected at most 4, got 5",
        "top_k: expected at most 8 of 96 experts, got 10",
        "option 'gemm' is unknown",
    ):
        assert [r for r in reasons if part in r], (part, reasons)
    assert len(reasons) == 7
    with pytest.raises(BackendUnsupportedError) as caught:
        FlashinferTrtllm().prepare(problem, H100, {"gemm": "triton"})
    assert caught.value.reasons == reasons


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_experts": 258, "n_group": 1, "topk_group": 1}, "num_experts: expected a multiple of 4, got 258"),
        ({"num_experts": 1024, "n_group": 1, "topk_group": 1}, "num_experts: expected at most 512, got 1024"),
        ({"num_experts": 256, "n_group": 4}, "groups: expected at most 32 experts, got 64"),
        ({"num_experts": 32, "topk_group": 2}, "top_k: expected less than the 8 experts of the kept groups, got 8"),
        (
            {"num_experts": 512, "n_group": 1, "topk_group": 1, "top_k": 23},
            "top_k: expected at most 22 of 512",
        ),
        (
            {"n_group": 1, "topk_group": 1, "routing_method": "softmax"},
            "expected deepseek_v3, got 'softmax'",
        ),
    ],
)
def test_limits_of_the_routing_kernel(fake_flashinfer, fields, reason):
    fake_flashinfer()
    (got,) = FlashinferTrtllm().not_supported_reasons(MoEProblem(**fields), B200, {})
    assert reason in got


@pytest.mark.parametrize(
    "fields",
    [
        dataclasses.asdict(KIMI_K2),
        dataclasses.asdict(GLM_4_5_AIR),
        {"num_experts": 512, "n_group": 1, "topk_group": 1, "top_k": 22},
        {"num_experts": 128, "num_local_experts": 128},
    ],
)
def test_problems_within_the_limits(fake_flashinfer, fields):
    fake_flashinfer()
    assert FlashinferTrtllm().not_supported_reasons(MoEProblem(**fields), B200, {}) == []


@pytest.mark.parametrize("version", ["0.5.3", "0.6.13", "0.8.0", "0.8.0.dev20261101", "1.0", "unknown"])
def test_versions_out_of_range_are_refused(fake_flashinfer, version):
    fake_flashinfer(version=version)
    (reason,) = FlashinferTrtllm().not_supported_reasons(DEEPSEEK_V3, B200, {})
    assert reason == f"flashinfer-python: expected >=0.6.14,<0.8, got {version}"


@pytest.mark.parametrize("version", [*VERSIONS, "0.7", "0.7.3", "0.7.2+cu130"])
def test_versions_in_range_are_taken(fake_flashinfer, version):
    fake_flashinfer(version=version)
    assert FlashinferTrtllm().not_supported_reasons(DEEPSEEK_V3, B200, {}) == []


def test_a_flashinfer_of_unknown_version_is_refused(fake_flashinfer, monkeypatch):
    fake_flashinfer(package="flashinfer-fork")

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (reason,) = FlashinferTrtllm().not_supported_reasons(DEEPSEEK_V3, B200, {})
    assert "its version is unknown" in reason


def test_a_flashinfer_that_cannot_be_imported_is_refused(fake_flashinfer):
    fake_flashinfer("import a_missing_dependency")
    with pytest.raises(BackendUnsupportedError, match="can't be imported: No module named 'a_missing_dependency'"):
        FlashinferTrtllm().prepare(DEEPSEEK_V3, B200, {})


def test_a_bug_inside_flashinfer_is_not_taken_for_a_refusal(fake_flashinfer):
    fake_flashinfer("1 / 0")
    with pytest.raises(ZeroDivisionError):
        FlashinferTrtllm().prepare(DEEPSEEK_V3, B200, {})


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("", f"flashinfer-python {NEWEST} has no flashinfer.fused_moe.trtllm_fp8_block_scale_moe"),
        ("def trtllm_fp8_block_scale_moe(routing_logits, **rest): ...", "takes no argument 'output', which this"),
        ("def trtllm_fp8_block_scale_moe(routing_logits, other): ...", "wants an argument 'other', which this"),
    ],
)
def test_a_changed_function_is_refused_when_prepared(fake_flashinfer, code, reason):
    fake_flashinfer(code)
    with pytest.raises(BackendUnsupportedError, match=re.escape(reason)):
        FlashinferTrtllm().prepare(DEEPSEEK_V3, B200, {})


# The contract with flashinfer's releases


def call_arguments() -> dict:
    """The keyword arguments of a real call of the runner."""
    seen = {}
    runner = flashinfer_trtllm._TrtllmRunner(lambda **arguments: seen.update(arguments), SMALL)
    runner.run(make_inputs(3, 4), poison(3))
    return seen


@pytest.mark.parametrize("version", VERSIONS)
def test_the_call_fits_the_signature(version):
    signature = recorded_signature(version)
    arguments = call_arguments()
    assert contract_reasons(signature, SMALL) == []
    bound = signature.bind(**arguments)  # TypeError if an argument is unknown or missing
    assert set(bound.arguments) == set(arguments)
    # What isn't passed is left at a default that means the definition.
    for name, default in (
        ("fp8_quantization_type", "Fp8QuantizationType.DeepSeekFp8"),
        ("activation_type", "ActivationType.Swiglu.value"),
        ("norm_topk_prob", "True"),
    ):
        assert name not in arguments and signature.parameters[name].default == default


@pytest.mark.parametrize("version", VERSIONS)
def test_a_signature_without_any_of_our_arguments_is_noticed(version):
    signature = recorded_signature(version)
    for name in call_arguments():
        parameters = [p for p in signature.parameters.values() if p.name != name]
        (reason,) = contract_reasons(signature.replace(parameters=parameters), SMALL)
        assert f"takes no argument {name!r}" in reason


def test_the_recorded_releases_span_the_range():
    first, excluded = flashinfer_package.VERSION_RANGE.removeprefix(">=").split(",<")
    assert VERSIONS[0] == first
    assert len(VERSIONS) == len(set(VERSIONS)) and not any(v.startswith(excluded) for v in VERSIONS)


def test_the_extra_has_the_range():
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    wanted = flashinfer_package.PACKAGE + flashinfer_package.VERSION_RANGE
    assert wanted in [requirement.replace(" ", "") for requirement in extras["flashinfer"]]


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer isn't installed")
def test_the_call_fits_the_installed_flashinfer():
    module = pytest.importorskip("flashinfer.fused_moe")
    signature = inspect.signature(module.trtllm_fp8_block_scale_moe)
    assert contract_reasons(signature, SMALL) == []
    signature.bind(**call_arguments())


def test_the_emulation_has_the_newest_release_s_arguments():
    emulated = inspect.signature(trtllm_emulation.trtllm_fp8_block_scale_moe).parameters
    assert set(emulated) == set(recorded_signature(NEWEST).parameters)


def test_arguments_of_the_definition():
    assert layer_arguments(DEEPSEEK_V3) == {
        "num_experts": 256,
        "top_k": 8,
        "n_group": 8,
        "topk_group": 4,
        "intermediate_size": 2048,
        "local_num_experts": 32,
        "routing_method_type": 2,
        "use_shuffled_weight": False,
        "weight_layout": 0,
        "do_finalize": True,
        "enable_pdl": True,
        "tune_max_num_tokens": 16384,
    }


# Tensor layouts


def test_the_emulation_can_tell_a_wrong_layout(fake_flashinfer):
    """The layout test has teeth: halves swapped, scales transposed, another rank's offset."""
    inputs = make_inputs(5, 4)
    reference, local = moe_reference(inputs, SMALL), has_local_work(inputs, SMALL)
    assert local.any()
    half = SMALL.intermediate_size
    scale = inputs.hidden_states_scale
    wrong = (
        inputs._replace(gemm1_weights=torch.cat([inputs.gemm1_weights[:, half:], inputs.gemm1_weights[:, :half]], 1)),
        inputs._replace(hidden_states_scale=scale.t().reshape(scale.shape)),
        inputs._replace(local_expert_offset=5),
    )
    fake_flashinfer()
    runner = FlashinferTrtllm().prepare(SMALL, B200, {})
    for changed in wrong:
        output = poison(5)
        runner.run(changed, output)
        assert check(output, reference, local).relative_l2 > 0.3


def test_workspace_bound():
    runner = flashinfer_trtllm._TrtllmRunner(lambda **_: None, DEEPSEEK_V3)
    assert runner.workspace_bytes(1) == 8 * 128 * (4096 + 2048 + 2 * 7168 + 4 * 48)
    assert runner.workspace_bytes(14107) == (256 + 879) * 128 * 20672
