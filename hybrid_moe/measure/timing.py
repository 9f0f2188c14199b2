"""Timing on a GPU: CUDA-graph replay and eager calls with a cold L2, and the device's own peak rates.

One graph holds at least ten calls, on rotating copies of the weights and inputs: a single call between two events would
measure launch overhead and a warm cache.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..inputs import FP8, MoEInputs
from ..problem import MoEProblem
from ..reference import local_rows_per_expert_and_token
from .records import Latency

Call = Callable[[], object]
# Replays and loops that fill caches and clocks: not counted.
_WARM_UP_REPLAYS, _WARM_UP_LOOPS = 2, 1


class Clock(Protocol):
    """What timing asks of a device: `CudaClock` is a GPU's, tests bring one whose times they know."""

    def now_s(self) -> float:
        """The host's time in seconds, from any start."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued."""
        ...

    def device_us(self, call: Call) -> float:
        """Microseconds on the device from before the call's work to after it; waits for it."""
        ...

    def graph(self, calls: Sequence[Call]) -> Call:
        """Record the calls in one graph without running them, and give what replays it."""
        ...

    def cache_bytes(self) -> int:
        """Size of the last cache before memory."""
        ...


class CudaClock:
    """The current GPU's."""

    def now_s(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """See `Clock`."""
        torch.cuda.synchronize()

    def device_us(self, call: Call) -> float:
        """By CUDA events."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def graph(self, calls: Sequence[Call]) -> Call:
        """A CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        return graph.replay

    def cache_bytes(self) -> int:
        """Of the L2."""
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


CUDA_CLOCK = CudaClock()


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
    """Microseconds on the current GPU from before the call's work to after it, by CUDA events; waits for it."""
    return CUDA_CLOCK.device_us(call)


def time_graph(calls: Sequence[Call], runs: int = 20, clock: Clock = CUDA_CLOCK) -> Latency:
    """Record the calls in one graph and time its replays; microseconds of one call.

    Parameters
    ----------
    calls
        At least ten, each on other weights or inputs than the one before, already warmed up.
    runs
        Replays timed, after two that are not.
    clock
        The device's.
    """
    replay = clock.graph(calls)
    samples = [clock.device_us(replay) / len(calls) for _ in range(_WARM_UP_REPLAYS + runs)]
    return summarize(samples[_WARM_UP_REPLAYS:])


def time_eager(calls: Sequence[Call], runs: int = 20, clock: Clock = CUDA_CLOCK) -> tuple[Latency, Latency]:
    """Time the calls one after the other from Python: on the device, and the host's share of it.

    Returns
    -------
    device, host : Latency
        Microseconds of one call, from before the first launch to the end of the last kernel, and until the host has
        queued them all.
    """
    device, host = [], []
    for _ in range(_WARM_UP_LOOPS + runs):
        clock.synchronize()
        began = clock.now_s()
        for call in calls:
            call()
        queued = clock.now_s()
        clock.synchronize()
        done = clock.now_s()
        host.append((queued - began) * 1e6 / len(calls))
        device.append((done - began) * 1e6 / len(calls))
    return summarize(device[_WARM_UP_LOOPS:]), summarize(host[_WARM_UP_LOOPS:])


@dataclass(frozen=True, slots=True)
class PeakRates:
    """What this device does at best, measured: bytes read and dense FP8 operations in one second."""

    read_bytes_per_s: float
    fp8_flop_per_s: float


@dataclass(frozen=True, slots=True)
class Probe:
    """A call that does one thing, and how much of it: bytes or operations."""

    call: Call
    amount: int

    def per_second(self, runs: int, clock: Clock) -> float:
        """The median rate of so many runs, after two that don't count."""
        samples = [clock.device_us(self.call) for _ in range(_WARM_UP_REPLAYS + runs)]
        return self.amount / (statistics.median(samples[_WARM_UP_REPLAYS:]) * 1e-6)


def measure_peak_rates(clock: Clock = CUDA_CLOCK) -> PeakRates:
    """Read 4 GB and multiply two 8192 x 8192 e4m3 matrices (`torch._scaled_mm`); about 0.2 s."""
    num_sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return PeakRates(
        read_probe(2**30, num_sms * 8, "cuda").per_second(10, clock),
        multiply_probe(8192, "cuda").per_second(20, clock),
    )


def read_probe(elements: int, programs: int, device: str) -> Probe:
    """Reads so many int32, a multiple of 8192, each once."""
    from ..kernels.read import read_kernel  # where used: importing this module needs no Triton

    block = 8192
    source = torch.randint(0, 100, (elements,), dtype=torch.int32, device=device)
    sink = torch.empty(block, dtype=torch.int32, device=device)

    def read() -> None:
        read_kernel[(programs,)](source, sink, elements // block, BLOCK=block, num_warps=8)

    return Probe(read, source.numel() * source.element_size())


def multiply_probe(n: int, device: str) -> Probe:
    """Multiplies two n x n e4m3 matrices."""
    a, b = (torch.randn(n, n, device=device).to(FP8) for _ in range(2))
    one = torch.ones((), device=device)

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return Probe(multiply, 2 * n**3)


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

    def floor_us(self, peak: PeakRates) -> float:
        """The larger of the bytes' and the operations' time, in microseconds."""
        return max(self.bytes / peak.read_bytes_per_s, self.flop / peak.fp8_flop_per_s) * 1e6
