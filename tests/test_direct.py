"""Launches by addresses: what reaches the driver, by Triton's own code around a driver that only keeps what it gets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from hybrid_moe import MoEProblem
from hybrid_moe.kernels import direct, plan
from hybrid_moe.kernels.arena import Arena
from hybrid_moe.kernels.launcher import Constants, Kernel
from hybrid_moe.kernels.plan import Addressed, LaunchKey, Plan, addresses_of
from hybrid_moe.kernels.steps import LibraryStep
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights


@triton.jit
def direct_kernel(x, N: tl.constexpr):
    pass


HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The report of `stub_launches.py`."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler, for Triton's launcher as for the stub")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, HERE / "stub_launches.py", tmp_path_factory.mktemp("stub")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_driver_gets_the_same(seen):
    assert [name for name, *_ in seen["direct"]] == [
        "clear_kernel",
        "route_kernel",
        "gemm1_swiglu_kernel",
        "gemm2_kernel",
        "combine_kernel",
    ]
    for direct_launch, ordinary in zip(seen["direct"], seen["ordinary"], strict=True):
        assert direct_launch == ordinary  # grid, block, shared memory, stream, function, attributes; parameters
    assert seen["launches"] == 5


def test_a_descriptor_is_encoded_once_for_an_address(seen):
    assert (seen["encodings"], seen["encoded_again"], seen["encoded_elsewhere"]) == (2, 0, 1)


def test_another_plan_of_compiled_kernels_is_direct_at_once(seen):
    assert seen["direct_at_once"]


def test_no_kernel_is_launched_for_other_inputs_than_it_was_compiled_for(seen):
    """One of a bias in bfloat16 by the address of one in float32, say: nothing but the form of the call tells them."""
    assert seen["pointers"] == {"bfloat16": ["*fp32", "*bf16"], "float32": ["*fp32"] * 2, "routed": ["*i32", "*fp32"]}
    functions = {"bfloat16": function_of(seen["direct"][1])}
    for name, call in seen["others"].items():
        assert not call["direct_at_once"], "by a kernel of another call"
        assert call["direct"] == call["ordinary"]
        assert call["first_again"] == seen["direct"]
        functions[name] = function_of(call["direct"][1])
        # What is behind the routing is shared.
        assert [function_of(launch) for launch in call["direct"][2:]] == [function_of(f) for f in seen["direct"][2:]]
    assert [call["direct"][1][0] for call in seen["others"].values()] == ["route_kernel", "scatter_kernel"]
    assert len(set(functions.values())) == 3


def test_the_specialised_kernels_get_the_same(seen):
    many = seen["many_rows"]
    assert [name for name, *_ in many["direct"]][2:4] == ["hopper_gemm1_kernel", "hopper_gemm2_kernel"]
    assert many["direct"] == many["ordinary"]


def function_of(launch):
    """What the driver was given to run."""
    return launch[1][8]


def test_a_profilers_hook_sees_every_launch(seen):
    assert seen["hooked"] == [name for name, *_ in seen["direct"]]


def test_hooks(monkeypatch):
    runtime = triton.knobs.runtime
    assert not direct.is_hooked()
    monkeypatch.setattr(runtime, "launch_exit_hook", None)
    assert not direct.is_hooked()
    monkeypatch.setattr(runtime, "launch_exit_hook", print)
    assert direct.is_hooked()


class CudaLauncher:
    """Of a kernel that is launched as the real one, without descriptors."""

    def __init__(self, **changes):
        self.launch, self.launch_cooperative_grid, self.launch_pdl = self.record, False, True
        self.global_scratch_size = self.profile_scratch_size = 0
        self.arg_annotations, self.kernel_signature = ["annotations"], b"signature"
        vars(self).update(changes)

    def record(self, *arguments):
        self.got = arguments


def launcher_of(run):
    compiled = SimpleNamespace(run=run, function=11, packed_metadata=(4, 1, 0))
    return direct.launcher(compiled, (7, 2), [2, 0], Constants({"E": 5, "PDL": True}, {}))


def test_the_two_forms(monkeypatch):
    for release, wanted in (
        ((3, 6), (7, 2, 1, 9, 11, False, True, None, None, (4, 1, 0), None, None, None, "c", "a", 5, True)),
        (
            (3, 9),
            (7, 2, 1, 9, 11, False, True, (4, 1, 0), *(None,) * 5, ["annotations"], b"signature", ("c", "a", 5, True)),
        ),
    ):
        monkeypatch.setattr(direct, "_RELEASE", release)
        run = CudaLauncher()
        launcher_of(run)(9, ["a", "b", "c"])
        assert run.got == wanted


def test_what_only_triton_can_launch(monkeypatch):
    assert launcher_of(CudaLauncher()) is not None, f"Triton {triton.__version__} is not known to kernels/direct.py"
    for changes in ({"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"gsan_enabled": True}):
        assert launcher_of(CudaLauncher(**changes)) is None
    assert launcher_of(SimpleNamespace(**vars(CudaLauncher()))) is None
    monkeypatch.setattr(direct, "_RELEASE", (99, 0))
    assert launcher_of(CudaLauncher()) is None


class Compiled:
    """A kernel with this metadata."""

    def __init__(self, **metadata):
        self.metadata = SimpleNamespace(**metadata)


def test_descriptors_that_are_not_encoded():
    for metadata in ({}, {"tensordesc_meta": None}, {"tensordesc_meta": [None]}):
        assert direct.expanded(Compiled(**metadata), None, 0) is None
    assert direct.expanded(Compiled(tensordesc_meta=[{}]), None, 1) is None


def test_tensors_that_are_not_aligned_are_launched_by_triton():
    """Compiled kernels are for those that are; the output counts too."""
    problem = MoEProblem(
        num_experts=4, num_local_experts=2, top_k=1, n_group=1, topk_group=1, hidden_size=128, intermediate_size=128
    )
    inputs = make_inputs(Workload(2, 1), problem, random_weights(problem, "cpu"))
    odd = torch.empty(2 * 128 + 1, dtype=torch.bfloat16)[1:].view(2, 128)
    for output, direct_at_once in ((torch.empty(2, 128, dtype=torch.bfloat16), True), (odd, False)):
        key = LaunchKey.of(inputs, addresses_of(inputs), output, 1)
        assert (key.aligned, key.output_aligned) == (True, direct_at_once)
        made = Plan(key, Arena(), [], torch.device("cuda", 0))
        assert (made.addressed is not None) == direct_at_once
    assert (
        Plan(key._replace(aligned=False, output_aligned=True), Arena(), [], torch.device("cuda", 0)).addressed is None
    )


def test_libraries_run_between_the_kernels(monkeypatch):
    monkeypatch.setattr(plan, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 77)))
    seen = []

    def kernel(name):
        return lambda stream, values: seen.append((name, stream))

    addressed = Addressed(["local_expert_offset", "routed_scaling_factor", "output"], [], torch.device("cuda", 0))
    addressed.launchers += [kernel("gather"), kernel("sizes")]
    addressed.add(LibraryStep(lambda call: seen.append((call["name"], None))))
    addressed.launchers.append(kernel("swiglu"))
    addressed.add(LibraryStep(lambda call: seen.append((call["name"], None))))
    addressed.launchers.append(kernel("combine"))
    inputs = SimpleNamespace(local_expert_offset=0, routed_scaling_factor=1.0)
    addressed.run(inputs, [], 0, 0, {"name": "library"})
    assert [name for name, _ in seen] == ["gather", "sizes", "library", "swiglu", "library", "combine"]
    assert {stream for name, stream in seen if name != "library"} == {77}


def test_binaries_are_kept_for_aligned_tensors_on_their_device(monkeypatch):
    compiled = CompiledKernel.__new__(CompiledKernel)
    compiled.module = None
    kernel = Kernel(direct_kernel)
    monkeypatch.setattr(kernel, "function", {(3,): lambda *arguments, **options: compiled})
    constants, device = Constants({"N": 4}, {}), torch.device("cuda", 1)
    kernel.launch((3,), (5,), constants, device, aligned=False)
    assert kernel.compiled(constants, device) is None
    kernel.launch((3,), (5,), constants, device, aligned=True)
    assert kernel.compiled(constants, device) is compiled
    for other in (torch.device("cuda", 0), torch.device("cuda")):
        assert kernel.compiled(constants, other) is None
    assert kernel.compiled(Constants({"N": 4}, {}), device) is None
