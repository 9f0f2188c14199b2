"""Compile the pipeline's kernels for a GPU that isn't there, through the launch code that serving uses.

Run as a script, since the compiled and the interpreted kernels can't live in one process:
``python tests/compile_pipeline.py 90`` prints one JSON object a kernel: its name, arguments, shared memory, registers,
spills, and which matrix instructions its PTX holds. With the names of models (``90 kimi-k2``) it is
their layers, at the one T that takes the most intricate tiles, and without what stands around a library's GEMM.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from hybrid_moe.kernels import pipeline
from hybrid_moe.kernels.activations import quantize_rows
from hybrid_moe.kernels.external import external_inputs
from hybrid_moe.kernels.grouped_gemm.deep_gemm import padded_capacity
from hybrid_moe.kernels.grouped_gemm.library_rows import Rows, gather, swiglu
from hybrid_moe.kernels.grouped_gemm.triton_gemm import TritonGroupedGemm
from hybrid_moe.problem import FP8, MoEInputs, MoEProblem
from hybrid_moe.workloads import MODELS

MULTIPROCESSORS = {90: 132, 100: 148}
# Token counts that reach every plan of the tile table, routing by one program and by many.
TOKEN_COUNTS = (1, 16, 17, 80, 901, 2560, 4096, 14107)
MODEL_TOKEN_COUNTS = (80,)  # a tile of several tiers


class AbsentDriver:
    """Answers what Triton asks before it compiles; it can't launch."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_interface(self):
        return torch.cpu


def untouched_inputs(problem: MoEProblem, tokens: int) -> MoEInputs:
    """Inputs whose memory is reserved but never written: only shapes, strides and alignment are read."""
    e, h, i = problem.num_local_experts, problem.hidden_size, problem.intermediate_size
    return MoEInputs(
        torch.empty(tokens, problem.num_experts),
        torch.empty(problem.num_experts, dtype=torch.bfloat16),
        torch.empty(tokens, h, dtype=FP8),
        torch.empty(h // 128, tokens),
        torch.empty(e, 2 * i, h, dtype=FP8),
        torch.empty(e, 2 * i // 128, h // 128),
        torch.empty(e, h, i, dtype=FP8),
        torch.empty(e, h // 128, i // 128),
        32,
        2.5,
    )


def resources(kernel, capability: int) -> dict[str, object]:
    """Shared memory, and ptxas's own count of registers and spills."""
    ptx = kernel.asm["ptx"]
    ptxas = get_ptxas(capability)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas.path, "-v", f"--gpu-name=sm_{capability}a", source, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    log = done.stderr + done.stdout
    if done.returncode:
        raise RuntimeError(f"ptxas refused {kernel.name}: {log}")
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    return {
        "shared": kernel.metadata.shared,
        "registers": int(registers.group(1)) if registers else None,
        "spill_bytes": int(spill.group(1)) + int(spill.group(2)) if spill else None,
        "wgmma": "wgmma.mma_async" in ptx,
        "tcgen05": "tcgen05.mma" in ptx,
        "older_mma": "mma.sync.aligned" in ptx,
    }


def compile_all(capability: int, problem: MoEProblem, token_counts=TOKEN_COUNTS, libraries: bool = True):
    """Yield each kernel compiled, once for each specialisation. Leaves this process unable to launch.

    Without ``libraries`` those that stand around a library's grouped GEMM are left out.
    """
    triton.runtime.driver.set_active(AbsentDriver(capability))
    compiled: dict[str, tuple[str, dict, object]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        options = {k: v for k, v in kwargs.items() if isinstance(v, int | bool | tuple)}
        compiled.setdefault(kernel.hash, (self.__name__, options, kernel))
        return kernel

    JITFunction.run = compile_only
    CompiledKernel.__getitem__ = lambda self, grid: lambda *arguments: None
    launch = pipeline.Launch(MULTIPROCESSORS[capability], pdl=True)
    for tokens in token_counts:
        inputs = untouched_inputs(problem, tokens)
        output = torch.empty(tokens, problem.hidden_size, dtype=torch.bfloat16)
        quantize_rows(torch.empty(tokens, problem.hidden_size, dtype=torch.bfloat16))
        gemm = TritonGroupedGemm((capability // 10, capability % 10))
        routed = pipeline.route(inputs, problem, launch, gemm.num_tickets(problem, tokens))
        gemm.run(inputs, routed, problem, launch, output)
        # Around a library's grouped GEMM: sgl-kernel's scales are row-major and its rows unpadded, DeepGEMM's neither.
        for align, row_major in ((1, True), (128, False)) if libraries else ():
            capacity = padded_capacity(problem, tokens, align)
            rows = Rows.allocate(problem, capacity, output.device, align=align, row_major_scales=row_major)
            gather(inputs, routed, problem, launch, rows, problem_tables=row_major)
            swiglu(routed, problem, launch, rows)
            pipeline.combine(rows.gemm2, routed, problem, launch, output, 0, align=align)
        external_inputs(inputs, problem, launch)
    for name, options, kernel in compiled.values():
        yield {"kernel": name, "options": options, **resources(kernel, capability)}


if __name__ == "__main__":
    capability, *models = sys.argv[1:]
    layers = [(MODELS[model], MODEL_TOKEN_COUNTS, False) for model in models] or [(MoEProblem(), TOKEN_COUNTS, True)]
    for row in (row for layer in layers for row in compile_all(int(capability), *layer)):
        print(json.dumps(row), flush=True)
