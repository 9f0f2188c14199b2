"""Time both grouped GEMMs of a call, in operations a second, beside `torch._scaled_mm` on as many rows.

python benchmarks/gemms.py --output benchmarks/results/DEVICE/gemms.md
python benchmarks/gemms.py --tokens 4096 --routing concentrated --provider triton

A GEMM's time is the difference between two CUDA graphs: of a call's launches up to it and with it, twelve calls on
three copies of the weights. So what overlaps with the launch before it isn't counted twice. Operations are those of the
rows that the local experts got, without padding; ours does the gather, SwiGLU and quantisation in them.

`torch._scaled_mm` has one matrix of as many rows, one scale for each operand and fast accumulation: what the tensor
cores give at best at this size. All graphs of a T take turns, replay by replay, so that they meet the same clock.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybrid_moe.device import DeviceKey
from hybrid_moe.files import write_whole
from hybrid_moe.inputs import FP8, Inputs
from hybrid_moe.kernels.grouped_gemm.base import GroupedGemm
from hybrid_moe.kernels.grouped_gemm.deep_gemm import DeepGemmGroupedGemm
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import limits_of
from hybrid_moe.kernels.pipeline import Pipeline
from hybrid_moe.kernels.plan import LaunchKey, Plan, addresses_of
from hybrid_moe.kernels.steps import AnyStep, LibraryStep
from hybrid_moe.measure.timing import CUDA_CLOCK, Work, event_us, measure_peak_rates
from hybrid_moe.measure.workloads import MODELS, ROUTING_LOADS, Workload, make_inputs, random_weights
from hybrid_moe.policy.versions import installed_versions

TOKENS = (901, 2048, 4096, 8192, 16384, 32768)
COPIES, CALLS, RUNS = 3, 12, 7


def main() -> None:
    """Measure what the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-v3", choices=tuple(MODELS))
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help=f"default: {TOKENS}")
    parser.add_argument("--routing", default="uniform", choices=ROUTING_LOADS, help="routing load")
    parser.add_argument("--offset", type=int, default=32, help="first local expert; 32 of DeepSeek-V3 is a busy rank")
    parser.add_argument("--provider", nargs="*", default=["triton", "deep_gemm"], choices=("triton", "deep_gemm"))
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, torch finds none")
    problem, device = MODELS[options.model], torch.device("cuda", torch.cuda.current_device())
    peak = measure_peak_rates()
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    what = f"{DeviceKey.of(device).name}, {options.model}, {options.routing}, experts from {options.offset}"
    columns = " | ".join(f"{name}, us (TFLOP/s)" for name in (*options.provider, "_scaled_mm"))
    lines = [
        f"{what}; {versions}; read {peak.read_bytes_per_s / 1e12:.2f} TB/s, "
        f"`_scaled_mm` at 8192 {peak.fp8_flop_per_s / 1e12:.0f}",
        "",
        f"| T | rows | GEMM | {columns} |",
        "|--:|--:|--:|" + "--:|" * (len(options.provider) + 1),
    ]
    print("\n".join(lines), flush=True)
    weights = [random_weights(problem, device, seed) for seed in range(COPIES)]
    providers: dict[str, GroupedGemm] = {
        "triton": TritonGroupedGemm(DeviceKey.of(device).capability),
        "deep_gemm": DeepGemmGroupedGemm(),
    }
    for tokens in options.tokens:
        workload = Workload(tokens, options.offset, options.routing)
        first = make_inputs(workload, problem, weights[0])
        copies = [first._replace(**{name: getattr(one, name) for name in one.__dataclass_fields__}) for one in weights]
        rows = Work.of(first, problem).local_rows
        h, i = problem.hidden_size, problem.intermediate_size
        shapes = (rows, 2 * i, h), (rows, h, i)
        prefixes = {name: Prefixes(problem, providers[name], copies) for name in options.provider}
        calls = {(name, length): one.calls(length) for name, one in prefixes.items() for length in lengths(one.steps)}
        us = medians(calls | {("dense", n): dense(*shape) for n, shape in enumerate(shapes)})
        times = [
            *(gemms_of(one.steps, {n: us[name, n] for n in lengths(one.steps)}) for name, one in prefixes.items()),
            [us["dense", n] for n in range(len(shapes))],
        ]
        for number, (m, n, k) in enumerate(shapes):
            cells = [f"{one[number]:.1f} ({2 * m * n * k / one[number] / 1e6:.0f})" for one in times]
            lines.append(f"| {tokens} | {rows} | {number + 1} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if options.output:
        write_whole(options.output, ("\n".join(lines) + "\n").encode())


class Prefixes:
    """The launches of a call, and how long the first of them take."""

    def __init__(self, problem, gemm: GroupedGemm, inputs: Sequence[Inputs]) -> None:
        self._inputs, hidden = inputs, inputs[0].hidden_states
        self._output = torch.empty(hidden.shape, dtype=torch.bfloat16, device=hidden.device)
        key = LaunchKey.of(inputs[0], addresses_of(inputs[0]), self._output, gemm.row_alignment())
        plan = Pipeline(problem, gemm).plan(key, hidden.device, limits_of(hidden.device))
        self.steps = plan.steps
        self._plan = lambda length: Plan(key, plan.arena, plan.steps[:length], hidden.device)
        self._memory = torch.empty(plan.arena.bytes, dtype=torch.uint8, device=hidden.device)

    def calls(self, length: int) -> list[Callable[[], object]]:
        """Of the first ``length`` launches, on each copy of the weights in turn."""
        plan = self._plan(length)
        return [
            partial(plan.run, one, addresses_of(one), self._output, self._memory)
            for one in (self._inputs * CALLS)[:CALLS]
        ]


def medians(calls: Mapping[Any, Sequence[Callable[[], object]]]) -> dict[Any, float]:
    """Microseconds of one of each key's calls in a graph of all of them: the median of RUNS turns, after two."""
    replays = {}
    for key, of_key in calls.items():
        for call in of_key[:COPIES]:
            call()
        torch.cuda.synchronize()
        replays[key] = CUDA_CLOCK.graph(of_key)
    turns = [{key: event_us(replay) / len(calls[key]) for key, replay in replays.items()} for _ in range(2 + RUNS)]
    return {key: statistics.median(turn[key] for turn in turns[2:]) for key in calls}


def lengths(steps: Sequence[AnyStep]) -> list[int]:
    """How many launches are before each of a GEMM and with it."""
    at = [n for n in range(len(steps)) if gemm_of(steps, n)]
    return sorted({*at, *(n + 1 for n in at)})


def gemms_of(steps: Sequence[AnyStep], until: Mapping[int, float]) -> list[float]:
    """Microseconds of GEMM1 and of GEMM2, each of all its launches; ``until``: those of so many launches."""
    totals = [0.0, 0.0]
    for n in range(len(steps)):
        if number := gemm_of(steps, n):
            totals[number - 1] += until[n + 1] - until[n]
    return totals


def gemm_of(steps: Sequence[AnyStep], at: int) -> int:
    """Which GEMM a launch is, 1 or 2, or 0 for neither; a library's are its first and its second call."""
    step = steps[at]
    if isinstance(step, LibraryStep):
        return 1 + sum(isinstance(before, LibraryStep) for before in steps[:at])
    name = step.kernel.function.__name__
    return 1 if "gemm1" in name else 2 if "gemm2" in name else 0


def dense(m: int, n: int, k: int) -> list[Callable[[], object]]:
    """Calls of `torch._scaled_mm`, on three weights in turn; rows are rounded down to 16."""
    m = max(m // 16 * 16, 16)
    x = torch.randn(m, k, device="cuda").to(FP8)
    weights = [torch.randn(n, k, device="cuda").to(FP8) for _ in range(COPIES)]
    one = torch.ones((), device="cuda")

    def multiply(w: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return [partial(multiply, w) for w in (weights * CALLS)[:CALLS]]


if __name__ == "__main__":
    main()
