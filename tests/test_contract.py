"""Every backend, and every provider of a grouped GEMM, held to one contract: on emulations, and on a GPU as it is."""

import pytest
import torch
from backend_contract import BackendContract
from fake_flashinfer import TRTLLM, imported_from, tools_in, write_cutlass_package, write_package
from grouped_gemm_emulation import deep_gemm, sgl_kernel

from hybrid_moe import Candidate, DeviceKey, backends
from hybrid_moe.backends import triton_fused as triton_backend
from hybrid_moe.kernels import interpreter
from hybrid_moe.measure.workloads import DEEPSEEK_V3
from hybrid_moe.numerics import DEFAULT_TOLERANCE, OWN_KERNELS_TOLERANCE, Tolerance

HOPPER, BLACKWELL = DeviceKey("gpu_x", (9, 0)), DeviceKey("gpu_y", (10, 0))
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


def triton_fused(gemm):
    return Candidate("triton_fused", {"gemm": gemm})


class TestTorchReference(BackendContract):
    candidate = Candidate("torch_reference")
    tolerance = Tolerance(max_relative_l2=0.003)  # of the output's bfloat16 alone
    twin = False
    refused = ()
    capturable = False


class InTheInterpreter(BackendContract):
    """This package's Triton kernels on the CPU."""

    @pytest.fixture
    def installed(self):
        interpreter.repair()


@ON_CPU
class TestTriton(InTheInterpreter):
    candidate = triton_fused("triton")


@ON_CPU
class TestSglKernel(InTheInterpreter):
    candidate = triton_fused("sgl_kernel")
    device = HOPPER
    tolerance = Tolerance(max_relative_l2=0.02)  # it rounds GEMM1's result to bfloat16 first
    library = "sgl_kernel"
    alignment = 16

    @pytest.fixture
    def installed(self):
        interpreter.repair()
        with sgl_kernel():
            yield


@ON_CPU
class TestDeepGemm(InTheInterpreter):
    candidate = triton_fused("deep_gemm")
    device = HOPPER
    tolerance = Tolerance(max_relative_l2=0.02)
    library = "deep_gemm"
    alignment = 16

    @pytest.fixture
    def installed(self):
        interpreter.repair()
        with deep_gemm():
            yield


@ON_CPU
class TestFlashinferTrtllm(BackendContract):
    candidate = Candidate("flashinfer_trtllm")
    device = BLACKWELL
    tolerance = Tolerance(max_relative_l2=0.08)  # GEMM1's result is rounded to fp8 before SwiGLU and after it
    twin = False
    takes_routed = takes_gate_first = takes_shared_experts = takes_weight_on_input = False
    refused = (HOPPER, *BackendContract.refused)
    library = "flashinfer"
    tokens = (1, 2, 33)

    @pytest.fixture
    def installed(self, tmp_path):
        write_package(tmp_path, TRTLLM, "0.7.2")
        with imported_from(tmp_path):
            yield


@ON_CPU
class TestFlashinferCutlass(BackendContract):
    candidate = Candidate("flashinfer_cutlass")
    device = HOPPER
    tolerance = Tolerance(max_relative_l2=0.08)  # activations are rounded to fp8 before each GEMM
    twin = False
    takes_gate_first = takes_weight_on_input = False
    refused = (BLACKWELL, *BackendContract.refused)
    library = "flashinfer"
    alignment = 16

    @pytest.fixture
    def installed(self, tmp_path):
        interpreter.repair()
        write_cutlass_package(tmp_path)
        with tools_in(tmp_path / "tools"), imported_from(tmp_path):
            yield


@pytest.mark.gpu
@pytest.mark.parametrize("choice", backends.candidates(), ids=str, scope="class")
class TestOnAGpu(BackendContract):
    """What can run on this GPU, at full size."""

    where = "cuda"
    problem = DEEPSEEK_V3
    twin = False
    alignment = 16
    tokens = (1, 7, 16, 80, 901)

    @pytest.fixture(autouse=True)
    def in_its_place(self, choice):
        self.candidate, self.device = choice, DeviceKey.of("cuda")
        if reasons := backends.not_supported_reasons(self.problem, self.device, choice):
            pytest.skip(f"{choice} can't run here: {'; '.join(reasons)}")
        own = choice.backend in ("triton_fused", "torch_reference")
        self.tolerance = OWN_KERNELS_TOLERANCE if own else DEFAULT_TOLERANCE
        self.takes_routed = self.takes_shared_experts = choice.backend != "flashinfer_trtllm"
        self.takes_gate_first = self.takes_weight_on_input = own
        self.capturable = choice.backend != "torch_reference"
        if choice.backend.startswith("flashinfer"):
            self.moved = ("hidden_states", "hidden_states_scale", "routing_logits")  # it isn't known to look at others
        if choice.backend == "torch_reference":
            self.refused = ()


def test_every_candidate_is_held_to_it():
    held = {test.candidate for test in BackendContract.__subclasses__() if hasattr(test, "candidate")}
    held |= {test.candidate for test in InTheInterpreter.__subclasses__()}
    assert held == set(backends.candidates())


def test_each_gemm_has_a_provider_of_its_own():
    modules = {gemm: triton_backend.provider_module(gemm) for gemm in triton_backend.GEMMS}
    assert len(set(modules.values())) == len(modules)
    with pytest.raises(ValueError, match="gemm: expected one of triton, sgl_kernel, deep_gemm, got 'torch'"):
        triton_backend.provider_module("torch")
