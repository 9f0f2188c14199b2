"""Run the Triton pipeline under NVIDIA's compute-sanitizer: memcheck and racecheck, at few and at many tokens.

python benchmarks/sanitize.py                    # both tools; T = 15, 200 and 901: every form of both GEMMs
python benchmarks/sanitize.py --tool memcheck --tokens 15

Only this package's kernels are watched, one launch of each, on a layer of a seventh of DeepSeek-V3's width (the same
tiles and the same code): racecheck slows a kernel down a thousandfold. ``--full-size`` takes the whole layer. A tool
that watches nothing finds nothing: first memcheck has to find a planted error, in a kernel of the same list, and
racecheck a planted race between two warp groups. The exit code is 1 if a tool finds something, or doesn't find what was
planted for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hybrid_moe.kernels.grouped_gemm.sm90.common import LINE, PLAIN

# Of `triton_fused[gemm=triton]`, from routing to combine: parts of their names.
KERNELS = (
    "clear_kernel",
    "route_kernel",
    "gemm1_swiglu_kernel",
    "hopper_few_gemm1_kernel",
    "hopper_gemm1_kernel",
    "gemm2_kernel",
    "combine_kernel",
    "planted_race_kernel",
)
LAUNCHES = 5


def call(tokens: int, full_size: bool) -> None:
    """One call at a T, whose result is looked at: a kernel that isn't launched has no errors."""

    from hybrid_moe import fused_moe
    from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights

    problem = DEEPSEEK_V3 if full_size else dataclasses.replace(DEEPSEEK_V3, hidden_size=1024, intermediate_size=1024)
    inputs = make_inputs(Workload(tokens, 96), problem, random_weights(problem, "cuda"))
    output = fused_moe(*inputs, backend="triton_fused[gemm=triton]")
    if not bool(output.isfinite().all()) or not bool(output.any()):
        sys.exit(f"T = {tokens}: the result isn't finite, or all zeros")


@gluon.jit
def write_and_read(shared, out_ptr, ME: gl.constexpr):
    """What the other warp group does too, to the same memory and at the same time."""
    # One number: many would be stored by stmatrix, which racecheck doesn't watch.
    shared.store(gl.full([1], ME, gl.int32, layout=LINE))
    gl.store(out_ptr + ME + gl.arange(0, 1, layout=LINE), shared.load(LINE))


@gluon.jit
def planted_race_kernel(out_ptr):
    """Two warp groups that wait for nothing. Grid: (1,)."""
    shared = gl.allocate_shared_memory(gl.int32, [1], PLAIN)
    gl.warp_specialize([(write_and_read, (shared, out_ptr, 0)), (write_and_read, (shared, out_ptr, 1))], [4], [24])


def planted_race() -> None:
    """Launch it."""
    planted_race_kernel[(1,)](torch.empty(2, dtype=torch.int32, device="cuda"), num_warps=4)
    torch.cuda.synchronize()


def planted_error() -> None:
    """Clear more counters than there are."""
    from hybrid_moe.kernels.launcher import Constants
    from hybrid_moe.kernels.pipeline import CLEAR

    counters = torch.empty(1024, dtype=torch.int32, device="cuda")
    constants = Constants({"BLOCK": 1024, "PDL": False}, {"num_warps": 4})
    CLEAR.launch((1,), (counters, 2**24), constants, counters.device, True)
    torch.cuda.synchronize()


# What a tool has to find: how it is brought about, the tool, and what its summary starts with then.
PLANTED = {
    "planted error": (planted_error, "memcheck", "ERROR SUMMARY: [1-9]"),
    "planted race": (planted_race, "racecheck", "RACECHECK SUMMARY: [1-9]"),
}


def watch(sanitizer: str, tool: str, what: str, *arguments: str, seconds: float) -> tuple[int, str]:
    """Run a tool on a process of this script with ``--call``: its exit code, and the line in which it sums up."""
    command = [sanitizer, f"--tool={tool}", *(f"--kernel-name=kns={name}" for name in KERNELS)]
    command += [
        f"--launch-count={LAUNCHES}",
        "--error-exitcode=1",
        sys.executable,
        __file__,
        f"--call={what}",
        *arguments,
    ]
    # An allocation for each tensor: in the allocator's large blocks, what is past a tensor is no error.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return 1, f"not finished within {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    return done.returncode, lines[-1].strip("= ") if lines else (done.stderr or done.stdout)[-500:]


def main() -> None:
    """Start the tool on a process of this script that makes one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[15, 200, 901])
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for one tool at one T")
    parser.add_argument("--full-size", action="store_true", help="DeepSeek-V3's own width")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call in PLANTED:
        PLANTED[options.call][0]()
        return
    if options.call:
        call(int(options.call), options.full_size)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        parser.error("compute-sanitizer is wanted, a part of the CUDA toolkit; it isn't on PATH")
    said = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=True).stdout
    version = said.partition("Version ")[2].strip()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, compute-sanitizer {version}")
    bad = False
    size = ["--full-size"] if options.full_size else []
    tools = options.tool or ("memcheck", "racecheck")
    for what, (_, tool, found) in PLANTED.items():
        if tool in tools:
            _, verdict = watch(sanitizer, tool, what, seconds=options.time_limit)
            if not re.match(found, verdict):
                sys.exit(f"{tool} didn't find the {what}, so it watches nothing: {verdict}")
            print(f"{tool} found the {what}: {verdict}", flush=True)
    for tool in tools:
        for tokens in options.tokens:
            code, verdict = watch(sanitizer, tool, str(tokens), *size, seconds=options.time_limit)
            bad |= code != 0
            print(f"{tool} at T = {tokens}: {verdict}", flush=True)
    sys.exit(bad)


if __name__ == "__main__":
    main()
