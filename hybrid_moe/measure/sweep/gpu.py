"""Measuring on the GPU: weights, inputs and the gate of `measure.bench`, with the GPU's state around each record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...candidate import Candidate
from ...device import DeviceKey
from ...policy.schema import GraphOrEager
from ...problem import MoEProblem
from ..bench import Case, environment_of, measure, versions
from ..records import BenchRecord, EnvironmentValue, GpuState
from ..timing import CUDA_CLOCK, Clock, PeakRates, measure_peak_rates
from ..workloads import LayerWeights, Workload, random_weights
from .process import Identity

# The reference holds so many tokens at most: all 16384 would take half a minute.
SAMPLED_TOKENS = 1024
_RUNS, _RUNS_OF_LARGE, _LARGE = 15, 5, 4096


@dataclass(slots=True)
class _Made:
    """What is made once, on the GPU."""

    peak: PeakRates
    environment: dict[str, EnvironmentValue]
    copies: list[LayerWeights]


@dataclass(slots=True)
class GpuBench:
    """A `Bench` on the current GPU.

    Parameters
    ----------
    problem
        The layer.
    copies
        Weight copies in rotation, 1.4 GB each for DeepSeek-V3, so that no call finds its weights in the L2 cache.
    clock
        The GPU's.
    """

    problem: MoEProblem
    copies: int = 3
    clock: Clock = CUDA_CLOCK
    _made: _Made | None = field(default=None, init=False)
    _case: Case | None = field(default=None, init=False)

    def identify(self) -> Identity:
        """Slug and versions; the number of weight copies is among them, as it says how cold the caches are."""
        gpu_state()  # what it needs is missing now or never
        return Identity(DeviceKey.of("cuda").name, versions() | {"weight_copies": self.copies})

    def load(self, workload: Workload) -> None:
        """Inputs and reference of a workload; at first the device's peak rates and the weights as well."""
        self._case = None
        torch.cuda.empty_cache()
        if self._made is None:
            peak = measure_peak_rates(self.clock)
            copies = [random_weights(self.problem, "cuda", seed) for seed in range(self.copies)]
            self._made = _Made(peak, environment_of(peak) | {"weight_copies": self.copies}, copies)
        self._case = Case.make(workload, self.problem, self._made.copies, SAMPLED_TOKENS)
        self.clock.synchronize()

    def measure(self, choice: Candidate, timings: Sequence[GraphOrEager]) -> Iterator[BenchRecord]:
        """See `bench.measure`; records have ``gpu_before`` and ``gpu_after`` besides the usual fields."""
        assert self._case is not None and self._made is not None
        runs = _RUNS if self._case.workload.num_tokens <= _LARGE else _RUNS_OF_LARGE
        before = gpu_state()
        peak, environment = self._made.peak, self._made.environment
        for record in measure(self._case, choice, peak, environment, timings=timings, runs=runs, clock=self.clock):
            after = gpu_state()
            yield record.model_copy(update={"gpu_before": before, "gpu_after": after})
            before = after

    def usable(self) -> bool:
        """Whether the CUDA context survived; most errors on the device end it."""
        try:
            self.clock.synchronize()
            torch.cuda.empty_cache()  # it may have been the memory that it lacked
        except RuntimeError:
            return False
        return True


def gpu_state() -> GpuState:
    """Clocks in MHz, temperature in degrees Celsius, power in watts and what slows the current GPU down.

    By NVML, in well under a millisecond. What the GPU doesn't tell (as inside a MIG slice) is left out.
    """
    import pynvml  # where used: nobody else needs it

    readings = {
        "sm_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        "memory_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda gpu: round(pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3, 1),
        "slowed_by": lambda gpu: _reasons(pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)),
    }
    state: dict[str, Any] = {}
    try:
        pynvml.nvmlInit()
        # By UUID: NVML doesn't number the GPUs as CUDA does.
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
    except pynvml.NVMLError:
        return GpuState()
    for name, read in readings.items():
        try:
            state[name] = read(gpu)
        except pynvml.NVMLError:
            continue
    return GpuState(**state)


# Bits of NVML's clocks event reasons that mean less speed; idling and settings of an administrator aren't among them.
_SLOWDOWNS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def _reasons(bits: int) -> list[str]:
    return [name for bit, name in _SLOWDOWNS.items() if bits & bit]
