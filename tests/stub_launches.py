"""What reaches the CUDA driver by Triton's own launch and by `hybrid_moe.kernels.direct`, on a machine without a GPU.

Run as a script, in an environment without TRITON_INTERPRET: ``python tests/stub_launches.py FOLDER`` builds a driver in
FOLDER that only keeps what it is given (``cuda_stub.c``), compiles the kernels of a small layer for sm_90, and prints a
JSON object: for each launch of a call its numbers and parameters by both ways, and what else the test wants to know.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent


def build(folder: Path) -> None:
    """Compile the stub where Triton will find it, and start again with it."""
    compiler = os.environ.get("CC", "cc")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", HERE / "cuda_stub.c", "-o", library], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    os.execve(sys.executable, [sys.executable, __file__, str(folder), "--built"], environment)


def main(folder: Path) -> None:
    """Launch calls three times and print what the driver got."""
    import torch
    import triton
    from given_routing import routed_of
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    from hybrid_moe import MoEProblem
    from hybrid_moe.kernels import direct, pipeline
    from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
    from hybrid_moe.kernels.launcher import DeviceLimits
    from hybrid_moe.kernels.plan import LaunchKey, addresses_of, by_name
    from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights

    class Driver(nvidia.CudaDriver):
        """Without what asks torch for a GPU."""

        def __init__(self):
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 77
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    stub = ctypes.CDLL(str(folder / "libcuda.so.1"))
    triton.runtime.driver.set_active(Driver())
    size_of = {"i32": 4, "i64": 8, "fp32": 4, "nvTmaDesc": 128}

    def expect(compiled) -> int:
        """Tell the stub the parameters of a kernel, and return how many bytes they are."""
        sizes = []
        for kind in compiled.src.signature.values():
            if kind.startswith("tensordesc"):
                rank = kind.count(",", kind.index("["), kind.index("]")) + 1
                sizes += [128, *[4] * rank, *[8] * rank]
            elif kind != "constexpr":
                sizes.append(8 if kind.startswith("*") else size_of[kind])
        ctypes.c_int.in_dll(stub, "stub_num_params").value = len(sizes)
        (ctypes.c_int * len(sizes)).in_dll(stub, "stub_sizes")[:] = sizes
        return sum(sizes)

    def last(size: int) -> list:
        numbers = list((ctypes.c_uint64 * 10).in_dll(stub, "stub_launch"))
        return [numbers, bytes((ctypes.c_ubyte * size).in_dll(stub, "stub_params")).hex()]

    def counter(name: str) -> int:
        return ctypes.c_int.in_dll(stub, name).value

    problem = MoEProblem(
        num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=512, intermediate_size=256
    )
    inputs = make_inputs(Workload(3, 4), problem, random_weights(problem, "cpu"))
    output = torch.empty((3, 512), dtype=torch.bfloat16)
    flow = pipeline.Pipeline(problem, TritonGroupedGemm())  # the plain Triton kernels
    memory = torch.empty(flow.arena(3).bytes + 256, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 256 :]

    def plan_of(inputs, flow=flow, output=output):
        key = LaunchKey.of(inputs, addresses_of(inputs), output, 1)
        assert key.aligned and key.output_aligned
        return flow.plan(key, torch.device("cuda", 0), DeviceLimits(132, pdl=True))

    def launched_by_triton(plan, inputs, output=output, memory=memory) -> list:
        """What the driver gets for each step."""
        call, got = by_name(inputs, output, plan.arena, memory), []
        for step in plan.steps:
            size = expect(step.kernel.compiled(step.constants, plan.device))
            step.run(call, plan.device)
            got.append([step.kernel.function.__name__, *last(size)])
        return got

    def launched_by_address(plan, inputs, output=output, memory=memory) -> list:
        """The same."""
        addresses, addressed, got = addresses_of(inputs), plan.addressed, []
        assert addressed is not None, "no direct launch"
        launchers = addressed.launchers
        for launcher, step in zip(launchers, plan.steps, strict=True):
            size = expect(step.kernel.compiled(step.constants, plan.device))
            addressed.launchers = [launcher]
            addressed.run(inputs, addresses, output.data_ptr(), memory.data_ptr())
            got.append([step.kernel.function.__name__, *last(size)])
        addressed.launchers = launchers
        return got

    def run_first(plan, inputs, output=output, memory=memory) -> None:
        """Triton's own launches, which compile; the driver doesn't know the parameters yet."""
        ctypes.c_int.in_dll(stub, "stub_num_params").value = 0
        plan.run(inputs, addresses_of(inputs), output, memory)

    plan, addresses = plan_of(inputs), addresses_of(inputs)
    run_first(plan, inputs)
    ordinary = launched_by_triton(plan, inputs)
    before = counter("stub_launches"), counter("stub_encodings")
    by_address = launched_by_address(plan, inputs)
    launches, encodings = counter("stub_launches") - before[0], counter("stub_encodings") - before[1]
    addressed = plan.addressed

    # The same address again is encoded no more; another one is. The stub has to copy no parameters from here on.
    ctypes.c_int.in_dll(stub, "stub_num_params").value = 0
    moved = inputs._replace(gemm1_weights=inputs.gemm1_weights.clone())
    before_encodings = counter("stub_encodings")
    addressed.run(inputs, addresses, output.data_ptr(), memory.data_ptr())
    again = counter("stub_encodings") - before_encodings
    addressed.run(moved, addresses_of(moved), output.data_ptr(), memory.data_ptr())
    other = counter("stub_encodings") - before_encodings

    result = {
        "triton": triton.__version__, "ordinary": ordinary, "direct": by_address, "launches": launches,
        "encodings": encodings, "encoded_again": again, "encoded_elsewhere": other,
    }  # fmt: skip
    fresh = plan_of(inputs)
    result["direct_at_once"] = fresh.addressed is not None
    for name, hooked in (("direct_us", False), ("ordinary_us", True)):
        with mock.patch.object(direct, "is_hooked", lambda hooked=hooked: hooked):
            begin = time.perf_counter()
            for _ in range(2000):
                fresh.run(inputs, addresses, output, memory)
            result[name] = (time.perf_counter() - begin) / 2000 * 1e6
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    fresh.run(inputs, addresses, output, memory)
    result["hooked"] = seen
    triton.knobs.runtime.launch_enter_hook.calls.clear()

    # The same layer with a bias of the other dtype, and with experts that are chosen already; the first again between.
    def pointers(plan) -> list[str]:
        signature = plan.steps[1].kernel.compiled(plan.steps[1].constants, plan.device).src.signature
        return [kind for kind in signature.values() if kind.startswith("*")][:2]

    result["pointers"] = {"bfloat16": pointers(plan)}
    result["others"] = {}
    fine = inputs._replace(routing_bias=inputs.routing_bias.float())
    for name, others in (("float32", fine), ("routed", routed_of(inputs, problem))):
        plan = plan_of(others)
        at_once = plan.addressed is not None
        run_first(plan, others)
        result["others"][name] = {
            "direct_at_once": at_once,
            "ordinary": launched_by_triton(plan, others),
            "direct": launched_by_address(plan, others),
            "first_again": launched_by_address(plan_of(inputs), inputs),
        }
        result["pointers"][name] = pointers(plan)

    # Many rows: the specialised kernels, whose second one has two descriptors.
    problem = dataclasses.replace(problem, intermediate_size=1024)
    inputs = make_inputs(Workload(33, 4), problem, random_weights(problem, "cpu"))
    output = torch.empty((33, 512), dtype=torch.bfloat16)
    flow = pipeline.Pipeline(problem, TritonGroupedGemm((9, 0)))
    memory = torch.empty(flow.arena(33).bytes + 256, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 256 :]
    plan = plan_of(inputs, flow, output)
    run_first(plan, inputs, output, memory)
    result["many_rows"] = {
        "ordinary": launched_by_triton(plan, inputs, output, memory),
        "direct": launched_by_address(plan, inputs, output, memory),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    at = Path(sys.argv[1])
    main(at) if sys.argv[2:] == ["--built"] else build(at)
