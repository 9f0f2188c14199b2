"""One call of the layer through the real entry point, checked and simply timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..api import fused_moe
from ..candidate import Candidate
from ..inputs import MoEInputs
from ..numerics import Correctness, check
from ..problem import MoEProblem
from ..reference import has_local_work, moe_reference
from .bench import tolerance_of
from .timing import event_us

# Enough for a simple time; a call that takes longer than this by itself is timed once.
_BUDGET_S = 0.5
_MOST_RUNS = 20


@dataclass(frozen=True, slots=True)
class SimpleTime:
    """Median over ``runs`` single calls from Python, on one set of weights: good to look at, not to learn from."""

    median_us: float
    runs: int
    clock: str

    def __str__(self) -> str:
        if self.median_us < 1e3:
            return f"{self.median_us:.0f} us"
        return f"{self.median_us / 1e3:.3g} ms" if self.median_us < 1e6 else f"{self.median_us / 1e6:.3g} s"


def call_fused_moe(
    inputs: MoEInputs, problem: MoEProblem, output: torch.Tensor, backend: Candidate | str | None = None
) -> torch.Tensor:
    """`fused_moe` on inputs that belong together."""
    return fused_moe(*inputs, problem=problem, output=output, backend=backend)


def checked(
    output: torch.Tensor,
    inputs: MoEInputs,
    problem: MoEProblem,
    choice: Candidate,
    reference: torch.Tensor | None = None,
) -> Correctness:
    """Compare with the float32 reference by the gate's rule."""
    if reference is None:
        reference = moe_reference(inputs, problem)
    work = has_local_work(inputs, problem)
    return check(output, reference, work, tolerance_of(choice), width=problem.intermediate_size)


def simple_time(call: Callable[[], object], device: torch.device) -> SimpleTime:
    """Time single calls, already warmed up: by CUDA events, or by the wall clock on a CPU."""
    samples: list[float] = []
    began = time.perf_counter()
    while not samples or (len(samples) < _MOST_RUNS and time.perf_counter() - began < _BUDGET_S):
        samples.append(event_us(call) if device.type == "cuda" else _once(call))
    clock = "CUDA events" if device.type == "cuda" else "wall clock"
    return SimpleTime(statistics.median(samples), len(samples), clock)


def _once(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6
