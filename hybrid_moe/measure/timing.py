"""Timing on a GPU: CUDA-graph replay and eager calls with a cold L2, and the device's own ceilings.

One graph holds at least ten calls, on rotating copies of the weights and inputs: a single call between two events would
measure launch overhead and a warm cache.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..inputs import FP8, MoEInputs
from ..problem import MoEProblem
from ..reference import local_rows_per_expert_and_token
from .records import Latency

Call = Callable[[], object]


def summarize(samples: Sequence[float]) -> Latency:
    """Median and percentiles of samples in microseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Latency(
        median=round(statistics.median(ordered), 3),
        p10=round(ordered[math.floor(0.1 * last)], 3),
        p90=round(ordered[math.ceil(0.9 * last)], 3),
        runs=len(ordered),
    )


def event_us(call: Call) -> float:
    """Microseconds on the device from before the call's work to after it, by CUDA events; waits for it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def time_graph(calls: Sequence[Call], runs: int = 20) -> Latency:
    """Capture the calls in one CUDA graph and time its replays.

    Parameters
    ----------
    calls
        At least ten, each on other weights or inputs than the one before, already warmed up.
    runs
        Replays timed, after two that are not.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    samples = [event_us(graph.replay) / len(calls) for _ in range(runs + 2)]
    return summarize(samples[2:])


def time_eager(calls: Sequence[Call], runs: int = 20) -> tuple[Latency, Latency]:
    """Time the calls one after the other from Python: on the device, and the host's share of it.

    Returns
    -------
    device, host : Latency
        From before the first launch to the end of the last kernel, and until the host has queued them all.
    """
    device, host = [], []
    for run in range(runs + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        done = time.perf_counter()
        if run:
            host.append((queued - began) * 1e6 / len(calls))
            device.append((done - began) * 1e6 / len(calls))
    return summarize(device), summarize(host)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device does at best, measured: bytes read and dense FP8 operations in one second."""

    read_bytes_per_s: float
    fp8_flop_per_s: float


def measure_ceilings() -> Ceilings:
    """Read 4 GB and multiply two 8192 x 8192 e4m3 matrices (`torch._scaled_mm`); about 0.2 s."""
    from ..kernels.read import read_kernel  # where used: importing this module needs no Triton

    block = 8192
    source = torch.randint(0, 100, (2**30,), dtype=torch.int32, device="cuda")
    sink = torch.empty(block, dtype=torch.int32, device="cuda")
    multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count

    def read() -> None:
        read_kernel[(multiprocessors * 8,)](source, sink, source.numel() // block, BLOCK=block, num_warps=8)

    read_us = _median_us(read, 10)
    n = 8192
    a = torch.randn(n, n, device="cuda").to(FP8)
    b = torch.randn(n, n, device="cuda").to(FP8)
    one = torch.ones((), device="cuda")
    multiply_us = _median_us(
        lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True), 20
    )
    return Ceilings(source.numel() * 4 / (read_us * 1e-6), 2 * n**3 / (multiply_us * 1e-6))


def _median_us(call: Call, runs: int) -> float:
    return statistics.median([event_us(call) for _ in range(runs + 2)][2:])


@dataclass(frozen=True, slots=True)
class Work:
    """What one call must do at the least.

    Attributes
    ----------
    local_rows
        (token, local expert) pairs.
    active_experts
        Local experts with at least one row.
    bytes
        Weights and scales of the active experts, the call's inputs and its output, each once. No intermediates.
    flop
        Operations of both GEMMs.
    """

    local_rows: int
    active_experts: int
    bytes: int
    flop: int

    @classmethod
    def of(cls, inputs: MoEInputs, problem: MoEProblem) -> Work:
        """Counted from the routing of ``inputs``."""
        chosen = local_rows_per_expert_and_token(inputs, problem)
        rows, active = int(chosen.sum()), int(chosen.any(dim=0).sum())
        h, i, b, tokens = problem.hidden_size, problem.intermediate_size, problem.block, inputs.num_tokens
        expert = 3 * h * i + 3 * (h // b) * (i // b) * 4
        call = tokens * (problem.num_experts * 4 + h + h // b * 4 + h * 2) + problem.num_experts * 2
        return cls(rows, active, active * expert + call, rows * 6 * h * i)

    def floor_us(self, ceilings: Ceilings) -> float:
        """The larger of the bytes' and the operations' time, in microseconds."""
        return max(self.bytes / ceilings.read_bytes_per_s, self.flop / ceilings.fp8_flop_per_s) * 1e6
