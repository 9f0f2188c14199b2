"""Run the Triton pipeline under NVIDIA's compute-sanitizer: memcheck and racecheck, at few and at many tokens.

python benchmarks/sanitize.py                    # both tools, T = 15 and 901
python benchmarks/sanitize.py --tool memcheck --tokens 15

Only this package's kernels are watched, one launch of each, on a layer of a seventh of DeepSeek-V3's width (the same
tiles and the same code): racecheck slows a kernel down a thousandfold. ``--full-size`` takes the whole layer. The exit
code is 1 if a tool finds something.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

# Of `triton_fused[gemm=triton]`, from routing to combine.
KERNELS = "clear_kernel|route_kernel|gemm1_swiglu_kernel|gemm2_kernel|combine_kernel"
LAUNCHES = 5


def call(tokens: int, full_size: bool) -> None:
    """One call at a T, whose result is looked at: a kernel that isn't launched has no errors."""

    from hybrid_moe import fused_moe
    from hybrid_moe.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights

    problem = DEEPSEEK_V3 if full_size else dataclasses.replace(DEEPSEEK_V3, hidden_size=1024, intermediate_size=512)
    inputs = make_inputs(Workload(tokens, 96), problem, random_weights(problem, "cuda"))
    output = fused_moe(*inputs, backend="triton_fused[gemm=triton]")
    if not bool(output.isfinite().all()) or not bool(output.any()):
        sys.exit(f"T = {tokens}: the result isn't finite, or all zeros")


def main() -> None:
    """Start the tool on a process of this script that makes one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[15, 901])
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for one tool at one T")
    parser.add_argument("--full-size", action="store_true", help="DeepSeek-V3's own width")
    parser.add_argument("--call", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        call(options.call, options.full_size)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        parser.error("compute-sanitizer is wanted, a part of the CUDA toolkit; it isn't on PATH")
    bad = False
    for tool in options.tool or ("memcheck", "racecheck"):
        for tokens in options.tokens:
            command = [sanitizer, f"--tool={tool}", f"--kernel-regex=kns={KERNELS}", f"--launch-count={LAUNCHES}"]
            command += ["--error-exitcode=1", sys.executable, __file__, f"--call={tokens}"]
            command += ["--full-size"] if options.full_size else []
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=options.time_limit)
                lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
                verdict = lines[-1].strip("= ") if lines else (done.stderr or done.stdout)[-500:]
                bad |= done.returncode != 0
            except subprocess.TimeoutExpired:
                verdict, bad = f"not finished within {options.time_limit:.0f} s", True
            print(f"{tool} at T = {tokens}: {verdict}", flush=True)
    sys.exit(bad)


if __name__ == "__main__":
    main()
