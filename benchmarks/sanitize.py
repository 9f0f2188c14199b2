"""Run the Triton pipeline under NVIDIA's compute-sanitizer: memcheck and racecheck, at few and at many tokens.

python benchmarks/sanitize.py                    # both tools, T = 15 and 901
python benchmarks/sanitize.py --tool memcheck --tokens 15

Only this package's kernels are watched, one launch of each, on a layer of a seventh of DeepSeek-V3's width (the same
tiles and the same code): racecheck slows a kernel down a thousandfold. ``--full-size`` takes the whole layer. A tool
that watches nothing finds nothing: first a planted error has to be found, in a kernel of the same list. The exit code
is 1 if a tool finds something, or if the planted error isn't found.
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

# Of `triton_fused[gemm=triton]`, from routing to combine: parts of their names.
KERNELS = (
    "clear_kernel",
    "route_kernel",
    "gemm1_swiglu_kernel",
    "hopper_gemm1_kernel",
    "gemm2_kernel",
    "combine_kernel",
)
LAUNCHES = 5
PLANTED = "planted"


def call(tokens: int, full_size: bool) -> None:
    """One call at a T, whose result is looked at: a kernel that isn't launched has no errors."""

    from hybrid_moe import fused_moe
    from hybrid_moe.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights

    problem = DEEPSEEK_V3 if full_size else dataclasses.replace(DEEPSEEK_V3, hidden_size=1024, intermediate_size=512)
    inputs = make_inputs(Workload(tokens, 96), problem, random_weights(problem, "cuda"))
    output = fused_moe(*inputs, backend="triton_fused[gemm=triton]")
    if not bool(output.isfinite().all()) or not bool(output.any()):
        sys.exit(f"T = {tokens}: the result isn't finite, or all zeros")


def planted_error() -> None:
    """Clear more counters than there are."""
    from hybrid_moe.kernels.launch import Constants
    from hybrid_moe.kernels.pipeline import CLEAR

    counters = torch.empty(1024, dtype=torch.int32, device="cuda")
    constants = Constants({"BLOCK": 1024, "PDL": False}, {"num_warps": 4})
    CLEAR.launch((1,), (counters, 2**24), constants, counters.device, True)
    torch.cuda.synchronize()


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
    parser.add_argument("--tokens", type=int, nargs="+", default=[15, 901])
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for one tool at one T")
    parser.add_argument("--full-size", action="store_true", help="DeepSeek-V3's own width")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call == PLANTED:
        planted_error()
        return
    if options.call:
        call(int(options.call), options.full_size)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        parser.error("compute-sanitizer is wanted, a part of the CUDA toolkit; it isn't on PATH")
    _, verdict = watch(sanitizer, "memcheck", PLANTED, seconds=options.time_limit)
    if not re.match("ERROR SUMMARY: [1-9]", verdict):
        sys.exit(f"memcheck didn't find a planted error, so it watches nothing: {verdict}")
    print(f"memcheck found the planted error: {verdict}", flush=True)
    bad = False
    size = ["--full-size"] if options.full_size else []
    for tool in options.tool or ("memcheck", "racecheck"):
        for tokens in options.tokens:
            code, verdict = watch(sanitizer, tool, str(tokens), *size, seconds=options.time_limit)
            bad |= code != 0
            print(f"{tool} at T = {tokens}: {verdict}", flush=True)
    sys.exit(bad)


if __name__ == "__main__":
    main()
