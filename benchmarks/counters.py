"""What binds each kernel of a call, by the GPU's counters: runs Nsight Compute (ncu) on one call of a layer at each T.

python benchmarks/counters.py --tokens 4096 8192 --output benchmarks/results/DEVICE/counters.md
python benchmarks/counters.py --model deepseek-v3-tp8 --tokens 1 8 1024 --backend 'triton_fused[gemm=deep_gemm]'

ncu runs each kernel several times, alone and with cold caches, so nothing overlaps here and the times don't add up to a
call's; clocks are left as they are. Rates are shares of the peak at the clock that ran. DRAM bytes: read and written.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hybrid_moe import fused_moe
from hybrid_moe.device import DeviceKey
from hybrid_moe.files import write_whole
from hybrid_moe.measure.sweep.plan import middle_rank
from hybrid_moe.measure.workloads import MODELS, ROUTING_LOADS, Workload, make_inputs, random_weights
from hybrid_moe.policy.versions import installed_versions

# By column: ncu's metric, what its base unit is divided by, and digits.
METRICS: Mapping[str, tuple[str, float, int]] = {
    "us": ("gpu__time_duration.sum", 1e3, 1),
    "SM clock, GHz": ("sm__cycles_elapsed.avg.per_second", 1e9, 2),
    "tensor cores, %": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", 1, 1),
    "L2, %": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1, 1),
    "L2 read by SMs, MB": ("lts__t_sectors_srcunit_tex_op_read.sum", 1e6 / 32, 1),
    "DRAM, %": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1, 1),
    "DRAM, MB": ("dram__bytes.sum", 1e6, 1),
    "warps, %": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1, 1),
}

MARKER = "spin_kernel"


def main() -> None:
    """Profile what the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-v3", choices=tuple(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--offset", type=int, help="first local expert; default: a rank in the middle")
    parser.add_argument("--routing", default="uniform", choices=ROUTING_LOADS, help="routing load")
    parser.add_argument("--backend", default="triton_fused[gemm=triton]")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds for all of it")
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")
    if options.profiled:
        run_profiled(options)
        return
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).exists():
        parser.error("expected ncu, a part of the CUDA toolkit, on PATH; got none")
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    offset = middle_rank(MODELS[options.model]) if options.offset is None else options.offset
    title = f"{DeviceKey.of(torch.device('cuda')).name}, {options.model}, {options.routing}, experts from {offset}"
    lines = [f"{title}, {options.backend}; {versions}", "", *table(profile(ncu, options.time_limit), options.tokens)]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        write_whole(options.output, text.encode())


def run_profiled(options: argparse.Namespace) -> None:
    """One call at each T, inside what ncu looks at; compiled and warm before."""
    problem, device = MODELS[options.model], torch.device("cuda")
    offset = middle_rank(problem) if options.offset is None else options.offset
    weights = random_weights(problem, device)
    inputs = [make_inputs(Workload(count, offset, options.routing), problem, weights) for count in options.tokens]
    for each in inputs:
        fused_moe(*each, problem=problem, backend=options.backend)
    torch.cuda.synchronize()
    for each in inputs:
        with torch.cuda.profiler.profile():
            torch.cuda._sleep(1)  # a call begins: MARKER
            fused_moe(*each, problem=problem, backend=options.backend)
            torch.cuda.synchronize()


def profile(ncu: str, seconds: float) -> list[dict[str, str]]:
    """The rows of ncu's table for this same command: a kernel each, in the order of their launches."""
    metrics = ",".join(metric for metric, _, _ in METRICS.values())
    options = ["--profile-from-start=off", "--clock-control=none", "--cache-control=all", f"--metrics={metrics}"]
    command = [ncu, *options, "--csv", "--page=raw", "--print-units=base", sys.executable, *sys.argv, "--profiled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    begin = done.stdout.find('"ID"')
    if done.returncode or begin < 0:
        sys.exit(f"ncu failed ({done.returncode}): {done.stdout[-2000:]}{done.stderr[-2000:]}")
    _units, *rows = csv.DictReader(io.StringIO(done.stdout[begin:]))
    return rows


def table(rows: Sequence[Mapping[str, str]], tokens: Sequence[int]) -> list[str]:
    """Markdown: a line for each kernel, at each T."""
    lines = [
        "| T | kernel | " + " | ".join(METRICS) + " |",
        "|---:|---|" + "---:|" * len(METRICS),
    ]
    calls = iter(tokens)
    count = 0
    for row in rows:
        name = row["Kernel Name"].split("(")[0]
        if MARKER in name:
            count = next(calls)
            continue
        cells = [_cell(row, *metric) for metric in METRICS.values()]
        lines.append(f"| {count} | `{name}` | " + " | ".join(cells) + " |")
    return lines


def _cell(row: Mapping[str, str], metric: str, unit: float, digits: int) -> str:
    try:
        return f"{float(row[metric].replace(',', '')) / unit:.{digits}f}"
    except (KeyError, ValueError):
        return ""


if __name__ == "__main__":
    main()
