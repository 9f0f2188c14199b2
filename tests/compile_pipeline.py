"""Compile the pipeline's kernels for a GPU that isn't there, through the launch code that serving uses.

Run as a script, since the compiled and the interpreted kernels can't live in one process:
``python tests/compile_pipeline.py 90`` prints one JSON object a kernel: its name, arguments, shared memory, registers,
spills, and which matrix instructions its PTX holds. With the names of models (``90 kimi-k2``) it is
their layers, at the T that take the most intricate tiles, and without what surrounds a library's GEMM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
import unittest.mock
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from hybrid_moe.inputs import FP8, MoEInputs, RoutedInputs
from hybrid_moe.kernels import pipeline
from hybrid_moe.kernels.activations import quantize_rows
from hybrid_moe.kernels.external import external_inputs
from hybrid_moe.kernels.few_tokens import few_tokens
from hybrid_moe.kernels.grouped_gemm import libraries as libraries_of_gemms
from hybrid_moe.kernels.grouped_gemm.deep_gemm import DeepGemmGroupedGemm
from hybrid_moe.kernels.grouped_gemm.sgl import SglGroupedGemm
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import DeviceLimits
from hybrid_moe.kernels.plan import LaunchKey, addresses_of, by_name
from hybrid_moe.kernels.steps import Step
from hybrid_moe.measure.workloads import MODELS
from hybrid_moe.problem import MoEProblem

NUM_SMS = {89: 142, 90: 132, 100: 148, 120: 188}
# Token counts that reach every plan of the tile table, routing by one program and by many.
TOKEN_COUNTS = (1, 16, 17, 80, 200, 250, 400, 2560, 4096, 14107)
MODEL_TOKEN_COUNTS = (1, 16, 80, 4096)  # tiles of several M buckets, and the specialised kernels


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


def keep_ptxas_log() -> None:
    """Have Triton keep what ptxas says beside each kernel, in a cache apart from that of calls."""
    make_cubin = CUDABackend.make_cubin

    def make_and_keep(self, source, metadata, *options):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            cubin = make_cubin(self, source, metadata, *options)
        metadata["ptxas_log"] = log.getvalue()
        return cubin

    CUDABackend.make_cubin = make_and_keep
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "with_ptxas_log")


def resources(kernel) -> dict[str, object]:
    """Shared memory, ptxas's own count of registers and spills, and the matrix instructions."""
    ptx, log = kernel.asm["ptx"], kernel.metadata.ptxas_log
    registers = re.search(r"Used (\d+) registers", log)
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {
        "triton": triton.__version__,
        "shared": kernel.metadata.shared,
        "registers": int(registers.group(1)),
        "spill_bytes": int(spill.group(1)) + int(spill.group(2)),
        "wgmma": "wgmma.mma_async" in ptx,
        "tcgen05": "tcgen05.mma" in ptx,
        "older_mma": "mma.sync.aligned" in ptx,
        "fp8_mma": re.search(r"mma\.sync\.aligned\S*\.e4m3", ptx) is not None,
    }


def run_all(problem, gemm, inputs, output, limits, aligned=True):
    """All steps of a call but those of other libraries; not ``aligned``: as for inputs that TMA can't read."""
    key = LaunchKey.of(inputs, addresses_of(inputs), output, gemm.usual_row_alignment)._replace(aligned=aligned)
    plan = pipeline.Pipeline(problem, gemm).plan(key, output.device, limits)
    call = by_name(inputs, output, plan.arena, torch.empty(plan.arena.bytes, dtype=torch.uint8))
    for step in plan.steps:
        if isinstance(step, Step):
            step.run(call, output.device)


class AroundSgl(SglGroupedGemm):
    """Without the library, which isn't wanted for what is around its calls."""

    def steps(self, problem, limits, key):
        with unittest.mock.patch.object(libraries_of_gemms, "sgl_grouped_mm"):
            return super().steps(problem, limits, key)


class AroundDeepGemm(DeepGemmGroupedGemm):
    """Without the library, as above."""

    def steps(self, problem, limits, key):
        with unittest.mock.patch.object(libraries_of_gemms, "deep_gemm"):
            return super().steps(problem, limits, key)


def compile_all(capability: int, problem: MoEProblem, token_counts=TOKEN_COUNTS, libraries: bool = True):
    """Return (name, options, compiled kernel), once for each specialisation. Leaves this process unable to launch.

    Without ``libraries`` those that surround a library's grouped GEMM are left out.
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
    limits = DeviceLimits(NUM_SMS[capability], pdl=capability >= 90)
    for tokens in token_counts:
        inputs = untouched_inputs(problem, tokens)
        output = torch.empty(tokens, problem.hidden_size, dtype=torch.bfloat16)
        quantize_rows(torch.empty(tokens, problem.hidden_size, dtype=torch.bfloat16))
        gemm = TritonGroupedGemm((capability // 10, capability % 10))
        run_all(problem, gemm, inputs, output, limits)
        if any(gemm.plan(problem, tokens).specialized):
            run_all(problem, gemm, inputs, output, limits, aligned=False)
        for around in (AroundSgl(), AroundDeepGemm()) if libraries else ():
            run_all(problem, around, inputs, output, limits)
        external_inputs(inputs, problem, limits)
        # Experts chosen before the call; and a bias in float32, once, as it is a load and no more.
        ids, weights = torch.empty(tokens, problem.top_k, dtype=torch.int32), torch.empty(tokens, problem.top_k)
        others = [RoutedInputs(ids, weights, *inputs[2:])]
        if libraries:
            others.append(inputs._replace(routing_bias=torch.empty(problem.num_experts)))
        for other in others:
            run_all(problem, gemm, other, output, limits)
            external_inputs(other, problem, limits)
    if libraries:
        weighted = dataclasses.replace(problem, top_k=1, n_group=1, topk_group=1, weight_on_input=True)
        run_all(weighted, gemm, inputs, output, limits)
    few_tokens(untouched_inputs(problem, 4), ids[:1].expand(4, -1), weights[:1].expand(4, -1), problem)
    JITFunction.run = run
    return list(compiled.values())


def compile_layers(capability: int, models: Sequence[str]):
    """`compile_all` for the layers of these models, or in full for DeepSeek-V3's if none is named."""
    keep_ptxas_log()
    layers = [(MODELS[model], MODEL_TOKEN_COUNTS, False) for model in models] or [(MoEProblem(), TOKEN_COUNTS, True)]
    for layer in layers:
        yield from compile_all(capability, *layer)


if __name__ == "__main__":
    capability, *models = sys.argv[1:]
    for name, options, kernel in compile_layers(int(capability), models):
        row = {"kernel": name, "options": options, **resources(kernel)}
        print(json.dumps(row), flush=True)
